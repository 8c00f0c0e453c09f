"""The notebooks: run anew and stored with what they show, by one command: ``python -m qlens.analysis.maintenance.run_notebooks``.

A notebook is its own source. What is stored beside its cells is what the last run of exactly these cells showed: of the
sources a digest is kept, which ``current`` compares. Widgets are left out, as no page without a kernel can show them.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from rich.console import Console
from traitlets.config import Config

from qlens.core.errors import InputError
from qlens.core.files import write_text

SIZE = "QLENS_NOTEBOOK_SIZE"
WIDGET = "application/vnd.jupyter.widget-view+json"
LIMIT = 600  # seconds for one cell
# one thread is fastest for tiny models, and the same everywhere
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def notebooks(folder: str | Path = "notebooks") -> list[Path]:
    """The numbered notebooks of a folder, in order.

    Raises:
        InputError: there are none.
    """
    found = sorted(Path(folder).glob("[0-9]*.ipynb"))
    if not found:
        raise InputError(f"folder {str(folder)!r} holds no numbered notebook like 1-title.ipynb")
    return found


def run(notebook: NotebookNode, folder: str | Path, cache: str | Path, size: str = "shown") -> NotebookNode:
    """Run a copy of a notebook in a fresh kernel, and return it as it is stored.

    Args:
        notebook: as ``nbformat.read`` gives it.
        folder: where it runs; whatever it writes lands there.
        cache: where the lab's worlds lie, shared by notebooks.
        size: "shown", or "small" for tests.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises.

    Example:
        >>> run(nbformat.read("notebooks/2-what-is-a-target.ipynb", 4), "runs", "runs/cache", "small")  # doctest: +SKIP
    """
    copy = nbformat.from_dict(json.loads(json.dumps(notebook)))
    with tempfile.TemporaryDirectory() as kept:  # the kernel's own files; by sockets there, no port is opened
        sockets = {"transport": "ipc", "connection_file": str(Path(kept, "kernel.json"))}
        client = NotebookClient(
            copy,
            config=Config({"ConnectionFileMixin": sockets}),
            timeout=LIMIT,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            record_timing=False,
            store_widget_state=False,
        )
        given = {SIZE: size, "QLENS_CACHE": str(Path(cache).absolute()), "IPYTHONDIR": kept}
        client.execute(env=os.environ | ALONE | given)
    return stored(copy)


def stored(notebook: NotebookNode) -> NotebookNode:
    """The notebook with clean metadata and the digest of its sources; widgets are taken out of what it shows."""
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [output for output in _outputs(cell) if WIDGET not in output.get("data", {})]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}, "qlens": {"sources": digest(notebook)}}
    )
    return notebook


def _outputs(cell: NotebookNode) -> list[NotebookNode]:
    """What a cell has put out; what was printed in pieces is joined, so that the same run is stored the same."""
    made: list[NotebookNode] = []
    for output in cell.outputs:
        last = made[-1] if made else None
        if output.output_type == "stream" and last is not None and last.get("name") == output.name:
            last.text += output.text
        else:
            made.append(output)
    return made


def digest(notebook: NotebookNode) -> str:
    """A hash of all cells' kinds and sources, in order."""
    cells = [[cell.cell_type, cell.source] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:16]


def current(notebook: NotebookNode) -> bool:
    """Whether what is stored was shown by exactly these cells, all of them, run in order."""
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    return notebook.metadata.get("qlens", {}).get("sources") == digest(notebook) and counts == [
        *range(1, len(counts) + 1)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the notebooks anew and store them."""
    parser = argparse.ArgumentParser(prog="python -m qlens.analysis.maintenance.run_notebooks", description=__doc__)
    parser.add_argument("--folder", default="notebooks", help="where they are (notebooks)")
    parser.add_argument("--only", default="", help="numbers, comma-separated")
    options = parser.parse_args(argv)
    say = Console(stderr=True)
    try:
        chosen = [
            path
            for path in notebooks(options.folder)
            if not options.only or path.name.partition("-")[0] in options.only.split(",")
        ]
    except InputError as error:
        sys.exit(f"notebooks: {error}")
    with tempfile.TemporaryDirectory() as folder:
        for path in chosen:
            start = time.monotonic()
            made = run(nbformat.read(path, 4), folder, Path(folder, "cache"))
            write_text(path, nbformat.writes(made) + "\n")
            say.print(f"{path}: {time.monotonic() - start:.0f} s, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
