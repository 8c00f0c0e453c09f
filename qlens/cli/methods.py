"""The verbs on registered methods: list and show."""

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import qlens
from qlens.cli.inputs import Source, figure_path, own_tokens
from qlens.cli.options import CompletionColumn, Data, Device, Dtype, Folder, Json, Loss, OnBad, PromptColumn, Rows, app
from qlens.core.errors import InputError
from qlens.core.files import shown_path
from qlens.registry import cards


@app.command("list")
def list_methods(
    near: Annotated[
        bool, typer.Option("--distances", help="Equivalent methods, and angles between the gradients of the others.")
    ] = False,
    model: Folder = None,
    teacher: Folder = None,
    reference: Folder = None,
    data: Data = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    on_bad: OnBad = None,
    rows: Rows = None,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
    figure: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="With --distances: draw them as a tree, its data beside it.", show_default="none"
        ),
    ] = None,
) -> None:
    """List the registered methods: trust, residual, scale, needs, paper; or the distances between their gradients."""
    source = Source(data, prompt_column, completion_column, on_bad)
    if near:
        return _list_distances(model, teacher, reference, source, rows, as_json, device, dtype, figure)
    options = (model, teacher, reference, *source, rows, device, dtype, figure)
    if any(value is not None for value in options):
        raise InputError(
            "--model, --teacher, --reference, --data, --rows, --device, --dtype and --figure go with --distances"
        )
    if as_json:
        return print(json.dumps(cards.summaries(), indent=2))
    table = Table(*cards.COLUMNS, box=None, header_style="bold", pad_edge=False)
    for family, members in cards.families().items():
        table.add_row(f"[bold]{family}[/bold]")
        for row in members:
            cells = (", ".join(v) if isinstance(v := row[name], list) else str(v) for name in cards.COLUMNS)
            table.add_row(*map(escape, cells))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _list_distances(
    model: str | None,
    teacher: str | None,
    reference: str | None,
    source: Source,
    rows: int | None,
    as_json: bool,
    device: str | None,
    dtype: str | None,
    figure: str | None,
) -> None:
    from qlens.lens.equivalences import distances

    path = None if figure is None else figure_path(figure)
    needs = ("old", "second", "negatives")
    where = own_tokens(model, teacher, reference, source, rows, device, dtype, needs)
    result = distances(where.get("tokens"))
    if path is not None:
        from qlens.analysis.plots.save import save_figure

        save_figure(result.plot(), path, result.angles().reset_index())
    print(json.dumps(result.to_dict(), indent=2) if as_json else result)
    if path is not None:
        typer.echo(f"Figure: {shown_path(path)}", err=as_json)


@app.command()
def show(
    name: Loss,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="Print the citation only.")] = False,
    as_json: Json = False,
) -> None:
    """Show one method's card."""
    with redirect_stdout(sys.stderr):
        variant = qlens.get(name)
    if bibtex:
        if not variant.method.bibtex:
            raise InputError(f"{variant.name} has no citation ({variant.paper or 'no paper is named'})")
        return print(variant.method.bibtex)
    print(json.dumps(cards.summary(variant), indent=2) if as_json else cards.card(variant))
