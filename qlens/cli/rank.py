"""The ranking of rows: ``qlens view --rank``."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

from qlens.core.errors import InputError, brief
from qlens.core.files import output_file, shown_path

PAGE, DATA = ".html", ".jsonl"


def output_path(out: str | None, by: str | None, drop_least: float | None) -> Path | None:
    """Where the page or the data go.

    Raises:
        InputError: another ending than theirs, or options of the data without a file for them.
    """
    path = None if out is None else output_file(out, "--out")
    if path is not None and path.suffix not in (PAGE, DATA):
        raise InputError(
            f"--out {brief(str(out))}: end it in {DATA} for the data with weights, or in {PAGE} for the page"
        )
    options = {"--by": by, "--drop-least": drop_least}
    if extra := [
        name for name, value in options.items() if value is not None and (path is None or path.suffix != DATA)
    ]:
        raise InputError(f"{extra[0]} is about the data that --out FILE{DATA} writes: give that too")
    if drop_least is not None and not 0 < drop_least < 1:
        raise InputError(f"--drop-least must be a share between 0 and 1, such as 0.1 for a tenth, got {drop_least:g}")
    return path


def rank_rows(
    models: dict[str, Any],
    rows: Any,
    variants: list[str] | None,
    max_rows: int | None,
    top: int,
    path: Path | None,
    candidates: int,
    by: str | None,
    drop_least: float | None,
    as_json: bool,
) -> None:
    """Rank rows, print the first ones, and write the page of these or the data."""
    from qlens.analysis.ranking import rank
    from qlens.analysis.ranking.first_rows import view_first

    with redirect_stdout(sys.stderr):
        ranking = rank(rows=[rows] if isinstance(rows, str) else rows, variants=variants, max_rows=max_rows, **models)
        lines = []
        if path is not None and path.suffix == DATA:
            lines = [f"Data: {ranking.export(path, by, drop_least)}"]
        elif path is not None:
            view_first(ranking, variants=variants, top=top, candidates=candidates, **models).save(path)
            lines = [f"View: {shown_path(path)} ({path.stat().st_size / 1e6:.1f} MB)"]
    print(ranking.to_jsonl(top) if as_json else ranking.text(top))
    notes = ranking.notes if as_json else []
    for line in (*notes, *lines):
        typer.echo(line, err=True)
