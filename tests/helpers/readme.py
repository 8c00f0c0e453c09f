"""Generated blocks of the README files: ``python tests/helpers/readme.py`` writes them anew; a test compares."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from qlens.registry import cards

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "analysis" / "results"


def block(text: str, name: str) -> str:
    """The lines between the markers of a block."""
    match = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.S)
    if match is None:
        raise LookupError(f"there is no block {name!r}")
    return match.group(1)


def python_blocks(text: str) -> list[str]:
    """The Python examples of a text, in order."""
    return re.findall(r"```python\n(.*?)```", text, re.S)


def console(verb: str, example: str, code: int = 0, lines: int | None = None) -> str:
    """The output of ``qlens VERB FILE.py:FUNCTION`` for the example of the README whose first line names its file.

    Args:
        lines: so many from the top, as ``| head -LINES`` prints them; None for all.
    """
    file = example.partition(":")[0]
    with tempfile.TemporaryDirectory() as folder:
        examples = python_blocks((ROOT / "README.md").read_text())
        (source,) = [each for each in examples if each.startswith(f"# {file}\n")]
        Path(folder, file).write_text(source)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-m", "qlens", verb, example],
            cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
    assert done.returncode == code, done.stderr
    output = done.stdout.strip().split("\n")[:lines]
    head = f" | head -{lines}" if lines else ""
    return f"```console\n$ qlens {verb} {example}{head}\n" + "\n".join(output).rstrip() + "\n```\n"


def families() -> str:
    """A line per family of methods: its name and its methods."""
    return "".join(
        f"- [{family}](variants/{family}): " + ", ".join(f"`{card['name']}`" for card in members) + "\n"
        for family, members in cards.families().items()
    )


def scores() -> str:
    """The tables of scores among all tables of the default comparison, their headings in bold."""
    tables = (RESULTS / "compare-default" / "table.md").read_text()
    score_tables = [each for each in tables.split("## ") if "is better)" in each.partition("\n")[0]]
    return "".join("**" + each.replace("better)", "better)**", 1) for each in score_tables)


BLOCKS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {
        "explain": lambda: console("explain", "my_loss.py:f", lines=19),
        "check": lambda: console("check", "my_trainer.py:compute_loss", code=1, lines=8),
        "families": families,
    },
    ROOT / "variants" / "README.md": {"methods": lambda: cards.markdown() + "\n"},
    RESULTS / "README.md": {"results": scores},
}


if __name__ == "__main__":
    for file, blocks in BLOCKS.items():
        text = file.read_text()
        for name, write in blocks.items():
            head, tail = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            text = text.replace(head + block(text, name) + tail, head + write() + tail)
        file.write_text(text)
