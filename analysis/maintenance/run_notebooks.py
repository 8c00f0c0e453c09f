"""Run the notebooks and store their outputs: ``python -m qlens.analysis.maintenance.run_notebooks``.

The kernel is nbclient's, without network ports; stored metadata are a digest of the sources, so that tests can tell whether
the outputs belong to the cells.
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
# one thread is fastest for tiny models, and deterministic
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def notebooks(folder: str | Path = "notebooks") -> list[Path]:
    """The numbered notebooks of a folder, in order.

    Raises:
        InputError: the folder has none.
    """
    paths = sorted(Path(folder).glob("[0-9]*.ipynb"))
    if not paths:
        raise InputError(f"folder {str(folder)!r} holds no numbered notebook like 1-title.ipynb")
    return paths


def run(
    notebook: NotebookNode, folder: str | Path, cache: str | Path, size: str = "shown", kernel: str = "python3"
) -> NotebookNode:
    """Run a copy of a notebook in a fresh kernel.

    Args:
        notebook: of ``nbformat.read``.
        folder: the working directory.
        cache: the cache folder of the lab, shared by notebooks.
        size: "shown", or "small" for tests.
        kernel: name of the Jupyter kernel.

    Returns:
        the notebook with its outputs, as it is stored.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises.

    Example:
        >>> run(nbformat.read("notebooks/2-what-is-a-target.ipynb", 4), "runs", "runs/cache", "small")  # doctest: +SKIP
    """
    copy = nbformat.from_dict(json.loads(json.dumps(notebook)))
    with tempfile.TemporaryDirectory() as files:  # of the kernel: Unix sockets instead of network ports
        sockets = {"transport": "ipc", "connection_file": str(Path(files, "kernel.json"))}
        client = NotebookClient(
            copy,
            config=Config({"ConnectionFileMixin": sockets}),
            timeout=LIMIT,
            kernel_name=kernel,
            resources={"metadata": {"path": str(folder)}},
            record_timing=False,
            store_widget_state=False,
        )
        variables = {SIZE: size, "QLENS_CACHE": str(Path(cache).absolute()), "IPYTHONDIR": files}
        client.execute(env=os.environ | ENVIRONMENT | variables)
    return stored(copy)


def stored(notebook: NotebookNode) -> NotebookNode:
    """The notebook with clean metadata and the digest of its sources, without widgets."""
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
    """Outputs of a cell, consecutive prints joined, so that equal runs are stored equally."""
    outputs: list[NotebookNode] = []
    for output in cell.outputs:
        last = outputs[-1] if outputs else None
        if output.output_type == "stream" and last is not None and last.get("name") == output.name:
            last.text += output.text
        else:
            outputs.append(output)
    return outputs


def digest(notebook: NotebookNode) -> str:
    """A hash of the kinds and sources of all cells."""
    cells = [[cell.cell_type, cell.source] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:16]


def current(notebook: NotebookNode) -> bool:
    """Whether the stored outputs are those of these cells, run in order."""
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    return notebook.metadata.get("qlens", {}).get("sources") == digest(notebook) and counts == [
        *range(1, len(counts) + 1)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m qlens.analysis.maintenance.run_notebooks", description=__doc__)
    parser.add_argument("--folder", default="notebooks", help="folder of the notebooks (notebooks)")
    parser.add_argument("--only", default="", help="numbers, comma-separated")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
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
            executed = run(nbformat.read(path, 4), folder, Path(folder, "cache"))
            write_text(path, nbformat.writes(executed) + "\n")
            console.print(f"{path}: {time.monotonic() - start:.0f} s, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
