"""The verb on texts: the token view and the ranking of rows."""

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

import qlens
from qlens.cli.inputs import own_models
from qlens.cli.options import Data, Device, Dtype, Folder, app
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
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The page.", show_default="view.html; none with --rank or --json"),
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Tokens of the vocabulary kept per position.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON Lines, an object per token (and row).")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Show the targets token by token as one HTML file; or rank tokens and rows by label weight."""
    default = None if rank or as_json else "view.html"
    path = default if out is None else out
    path = None if path is None else output_file(path, "--out")
    from qlens.data.rows import ignored_keys

    with redirect_stdout(sys.stderr):
        loaded, rows_read = own_models(
            model, teacher, reference, data, "cpu" if device is None else device, dtype, text
        )
        page = qlens.view(
            **loaded,
            text=rows_read,
            variants=None if variants is None else params.split_specs(variants),
            candidates=1 if path is None else candidates,
            max_rows=rows or (None if rank else 8),
        )
        if path is not None:
            (page.top(top) if rank else page).save(path)
    typer.echo(f"{page}; {len(page.skipped)} rows left out", err=True)
    if data is not None and (ignored := ignored_keys(rows_read)):
        typer.echo(f"{data}: keys that are ignored: {', '.join(ignored)}", err=True)
    if rank:
        print(page.rank().to_jsonl(top) if as_json else page.rank().text(top))
    elif as_json:
        print(page.to_jsonl())
    if path is not None:
        typer.echo(f"View: {shown_path(path)} ({path.stat().st_size / 1e6:.1f} MB)", err=as_json)
