"""The verb on texts: the token view and the ranking of rows."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import qlens
from qlens.cli.inputs import Source, figure_path, own_models
from qlens.cli.options import CompletionColumn, Data, Device, Dtype, Folder, OnBad, PromptColumn, app
from qlens.cli.rank import output_path, rank_rows
from qlens.cli.text import show_text
from qlens.core.errors import InputError
from qlens.core.files import output_file, shown_path
from qlens.registry import params

if TYPE_CHECKING:
    from qlens.analysis.token_view import TokenView


@app.command()
def view(
    model: Folder = None,
    data: Data = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    on_bad: OnBad = None,
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
    after: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Another checkpoint of the model: what moved between the two.", show_default="none"
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many rows of the data to read.", show_default="8; all with --rank or --vocabulary"
        ),
    ] = None,
    text_only: Annotated[
        bool,
        typer.Option(
            "--text-only", help="Print rows as text, what is learned between ⟦ and ⟧, and a report on the data."
        ),
    ] = False,
    rank: Annotated[
        bool, typer.Option("--rank", help="Order tokens and rows by label weight, the lowest first.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="With --rank or --vocabulary: how many of each are printed.")] = 10,
    vocabulary: Annotated[
        bool,
        typer.Option("--vocabulary", help="Print which entries of the vocabulary each method promotes and demotes."),
    ] = False,
    columns: Annotated[
        str | None,
        typer.Option(help="Keys of the rows to show, like reward: a number, or one per token.", show_default="none"),
    ] = None,
    segment: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=REGEX",
            help="A part of the text to take means over; may be repeated.",
            show_default="thinking and tool call by their tags; answer",
        ),
    ] = None,
    top_k_teacher: Annotated[
        int | None,
        typer.Option(min=1, help="Also read methods with the teacher's top K entries alone.", show_default="none"),
    ] = None,
    figure: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Draw a row as PNG, PDF or SVG, its data beside it.", show_default="none"),
    ] = None,
    row: Annotated[
        int | None, typer.Option(min=1, help="The row that --figure draws.", show_default="the first")
    ] = None,
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
            show_default="view.html; none with --rank, --vocabulary, --figure or --json",
        ),
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Tokens of the vocabulary kept per position.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON Lines, an object per token (and row).")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Show the targets token by token as one HTML file; or rank tokens and rows by label weight; or show the text alone."""
    source = Source(data, prompt_column, completion_column, on_bad)
    alone = {"--after": after, "--columns": columns, "--segment": segment, "--top-k-teacher": top_k_teacher}
    alone |= {"--figure": figure, "--vocabulary": vocabulary or None}
    if text_only:
        others = {**alone, "--rank": rank or None, "--variants": variants, "--teacher": teacher, "--out": out}
        if extra := [name for name, value in others.items() if value is not None]:
            raise InputError(f"{extra[0]} is about the models' predictions: leave it or --text-only out")
        return show_text(model, source, text, rows, as_json)
    if rank:
        path = output_path(out, by, drop_least)
        if extra := [name for name, value in alone.items() if value is not None]:
            raise InputError(f"{extra[0]} is about the view of single tokens: leave it or --rank out")
    elif by is not None or drop_least is not None:
        raise InputError(f"{'--drop-least' if by is None else '--by'} goes with --rank --out FILE.jsonl")
    else:
        default = None if vocabulary or figure or as_json else "view.html"
        path = default if out is None else out
        path = None if path is None else output_file(path, "--out")
    if row is not None and figure is None:
        raise InputError("--row goes with --figure FILE: it is the row that is drawn")
    picture = None if figure is None else figure_path(figure)
    keys = [] if columns is None else [name.strip() for name in columns.split(",")]
    patterns = None if segment is None else dict(map(_named_pattern, segment))
    most = rows or (None if rank or vocabulary else max(8, row or 0))
    from qlens.data.examples import singles
    from qlens.data.rows import ignored_keys

    with redirect_stdout(sys.stderr):
        loaded, rows_read = own_models(
            model, teacher, reference, source, "cpu" if device is None else device, dtype, text, after
        )
        specs = None if variants is None else params.split_specs(variants)
        if data is not None:
            if ignored := [key for key in ignored_keys(rows_read[:most]) if key not in keys]:
                typer.echo(f"{data}: columns that are ignored: {', '.join(ignored)}", err=True)
            rows_read = singles(rows_read, loaded["tokenizer"])
    if rank:
        rank_rows(loaded, rows_read, specs, rows, top, path, candidates, by, drop_least, as_json)
        return
    with redirect_stdout(sys.stderr):
        page = qlens.view(
            **loaded,
            text=rows_read,
            variants=specs,
            candidates=1 if path is None else candidates,
            max_rows=most,
            columns=keys,
            segments=patterns,
            top_k_teacher=top_k_teacher,
        )
        if path is not None:
            page.save(path)
        if picture is not None:
            _save_row(page, row, picture)
    typer.echo(f"{page}; {len(page.skipped)} rows left out", err=True)
    if vocabulary:
        print(_vocabulary(page, top, as_json))
    elif as_json:
        print(page.to_jsonl())
    if path is not None:
        typer.echo(f"View: {shown_path(path)} ({path.stat().st_size / 1e6:.1f} MB)", err=as_json)
    if picture is not None:
        typer.echo(f"Figure: {shown_path(picture)}", err=as_json)


def _save_row(page: "TokenView", row: int | None, path: Path) -> None:
    """Draw a row, by default the first, and save it with its data."""
    from qlens.analysis.plots.save import save_figure

    drawn = page.texts[0].row if row is None else row
    save_figure(page.plot(drawn, "label_weight"), path, page.table[page.table["row"] == drawn])


def _vocabulary(page: "TokenView", top: int, as_json: bool) -> str:
    """The first and last entries of the vocabulary table."""
    from qlens.analysis.ranking.ranking import jsonl
    from qlens.analysis.token_view.vocabulary import first_and_last, vocabulary_text

    entries = page.vocabulary
    return jsonl(first_and_last(entries, top)) if as_json else vocabulary_text(entries, top)


def _named_pattern(option: str) -> tuple[str, str]:
    """Name and regular expression of a --segment."""
    name, sign, pattern = option.partition("=")
    if not (name and sign and pattern):
        raise InputError(f"--segment must be NAME=REGEX, got {option!r}: write --segment 'answer=####.*'")
    return name, pattern
