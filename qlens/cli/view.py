"""The verb on texts: the token view and the ranking of rows."""

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

import qlens
from qlens.cli.inputs import own_models
from qlens.cli.options import Data, Device, Dtype, Folder, app
from qlens.cli.rank import output_path, rank_rows
from qlens.core.errors import InputError
from qlens.core.files import output_file, shown_path
from qlens.registry import params


@app.command()
def view(
    model: Folder = None,
    data: Data = None,
    text: Annotated[str | None, typer.Option(help="A text instead of a file.", show_default="none")] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            help="Specs and FILE.py:FUNCTIONs, comma-separated.",
            show_default="sft,dft; with a teacher also target_sft,kd",
        ),
    ] = None,
    teacher: Folder = None,
    reference: Folder = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="How many rows of the data to read.", show_default="8; all with --rank")
    ] = None,
    rank: Annotated[
        bool, typer.Option("--rank", help="Order tokens and rows by label weight, the lowest first.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="With --rank: how many of every order are printed and shown.")] = 10,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="With --rank --out FILE.jsonl: the method, or negative_margin, that weights or drops rows.",
            show_default="the first in which not all rows tie",
        ),
    ] = None,
    drop_least: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="With --rank --out FILE.jsonl: leave out this share of the rows, the least trusted, instead of weights.",
            show_default="none",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The page; with --rank FILE.html is the page of the first rows, FILE.jsonl the data with weights.",
            show_default="view.html; none with --rank or --json",
        ),
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Tokens of the vocabulary kept per position.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON Lines, an object per token (and row).")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Show the targets token by token as one HTML file; or rank tokens and rows by label weight."""
    if rank:
        path = output_path(out, by, drop_least)
    elif by is not None or drop_least is not None:
        raise InputError(f"{'--drop-least' if by is None else '--by'} goes with --rank --out FILE.jsonl")
    else:
        default = None if as_json else "view.html"
        path = default if out is None else out
        path = None if path is None else output_file(path, "--out")
    from qlens.data.rows import ignored_keys

    with redirect_stdout(sys.stderr):
        loaded, rows_read = own_models(
            model, teacher, reference, data, "cpu" if device is None else device, dtype, text
        )
        specs = None if variants is None else params.split_specs(variants)
        if data is not None and (ignored := ignored_keys(rows_read)):
            typer.echo(f"{data}: keys that are ignored: {', '.join(ignored)}", err=True)
    if rank:
        rank_rows(loaded, rows_read, specs, rows, top, path, candidates, by, drop_least, as_json)
        return
    with redirect_stdout(sys.stderr):
        page = qlens.view(
            **loaded, text=rows_read, variants=specs, candidates=1 if path is None else candidates, max_rows=rows or 8
        )
        if path is not None:
            page.save(path)
    typer.echo(f"{page}; {len(page.skipped)} rows left out", err=True)
    if as_json:
        print(page.to_jsonl())
    if path is not None:
        typer.echo(f"View: {shown_path(path)} ({path.stat().st_size / 1e6:.1f} MB)", err=as_json)
