"""The README's generated blocks: ``python tests/readme.py`` writes them anew; a test compares."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from qlens import cards

README = Path(__file__).parent.parent / "README.md"
RESULTS = README.parent / "analysis" / "results" / "compare-default"


def block(text: str, name: str) -> str:
    """What stands between the markers of a block."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.S)
    if found is None:
        raise LookupError(f"README.md has no block {name!r}")
    return found.group(1)


def python_blocks(text: str) -> list[str]:
    """The README's Python examples, in order."""
    return re.findall(r"```python\n(.*?)```", text, re.S)


def console(text: str, verb: str, example: str, code: int = 0) -> str:
    """What ``qlens VERB FILE.py:FUNCTION`` prints for the example whose first line names its file."""
    file = example.partition(":")[0]
    with tempfile.TemporaryDirectory() as folder:
        (source,) = [block for block in python_blocks(text) if block.startswith(f"# {file}\n")]
        Path(folder, file).write_text(source)
        path = os.pathsep.join(filter(None, [str(README.parent), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-m", "qlens", verb, example],
            cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
    assert done.returncode == code, done.stderr
    return f"```console\n$ qlens {verb} {example}\n{done.stdout.strip()}\n```\n"


def scores(tables: str) -> str:
    """The tables of scores among all tables of a run, their headings in bold."""
    kept = [block for block in tables.split("## ") if "is better)" in block.partition("\n")[0]]
    return "".join("**" + block.replace("better)", "better)**", 1) for block in kept)


def generated(text: str) -> dict[str, str]:
    """Every generated block, as it should be."""
    return {
        "explain": console(text, "explain", "my_loss.py:f"),
        "check": console(text, "check", "my_trainer.py:compute_loss", code=1),
        "methods": cards.markdown() + "\n",
        "results": scores((RESULTS / "table.md").read_text()),
    }


if __name__ == "__main__":
    text = README.read_text()
    for name, made in generated(text).items():
        head, tail = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        text = text.replace(head + block(text, name) + tail, head + made + tail)
    README.write_text(text)
