"""The command line: one verb per thing a user does, each a few lines over the library."""

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import qlens
from qlens.cli import console
from qlens.cli.inputs import ROWS, figure_path, own_models, own_tokens, slug
from qlens.core.errors import InputError
from qlens.core.files import output_file, shown_path
from qlens.registry import cards, params

app = typer.Typer(
    help="See and design the target distribution behind any supervised fine-tuning loss.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

LAB_SETTINGS = "strong-prior,weak-prior"
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[str | None, typer.Option(metavar="DIR", help="A Hugging Face model folder.", show_default="none")]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="JSON Lines: question/answer, prompt/completion, messages or text.", show_default="none"
    ),
]
Device = Annotated[str | None, typer.Option(help="Where models run: cpu, cuda, ...", show_default="cpu")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...", show_default="as saved")]
Rows = Annotated[int | None, typer.Option(min=1, help="How many rows of the data to read.", show_default=str(ROWS))]
Loss = Annotated[str, typer.Argument(help="A method's spec, like dft or kd(temperature=2.0), or FILE.py:FUNCTION.")]


@app.command("list")
def list_methods(
    near: Annotated[
        bool, typer.Option("--distances", help="Which methods are one, and how far apart the others are.")
    ] = False,
    model: Folder = None,
    teacher: Folder = None,
    reference: Folder = None,
    data: Data = None,
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
    """List the registered methods: trust, residual, scale, needs, paper; or how they relate, on probes or on your own text."""
    if near:
        return _list_distances(model, teacher, reference, data, rows, as_json, device, dtype, figure)
    given = (model, teacher, reference, data, rows, device, dtype, figure)
    if any(each is not None for each in given):
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
    data: str | None,
    rows: int | None,
    as_json: bool,
    device: str | None,
    dtype: str | None,
    figure: str | None,
) -> None:
    from qlens.lens.equivalences import distances

    path = None if figure is None else figure_path(figure)
    needs = ("old", "second", "negatives")
    where = own_tokens(model, teacher, reference, data, rows, device, dtype, needs)
    found = distances(where.get("tokens"))
    if path is not None:
        from qlens.analysis.plots.save import save_figure

        save_figure(found.plot(), path, found.angles().reset_index())
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)
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


@app.command()
def explain(
    loss: Loss,
    model: Folder = None,
    teacher: Folder = None,
    reference: Folder = None,
    data: Data = None,
    rows: Rows = None,
    figure: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Where the figure goes, its data beside it.", show_default="explain-NAME.png"
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print also label weights, simplex, scope, what was tried and where it ends.")
    ] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print the table as LaTeX.")] = False,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Show the target a loss trains toward, on built-in probes or on your own model and text."""
    with redirect_stdout(sys.stderr):  # what a user's file prints is no part of the answer
        variant = qlens.get(loss)
        unasked = None if as_json or latex else f"explain-{slug(loss)}.png"
        path = unasked if figure is None else figure
        path = None if path is None else figure_path(path)
        thin = variant.scope == "token"
        where = own_tokens(model, teacher, reference, data, rows, device, dtype, variant.needs, thin=thin)
        read = qlens.explain(variant, **where)
        answer = read.to_latex() if latex else json.dumps(read.to_dict(), indent=2) if as_json else read.text(full)
        if path is not None:
            from qlens.analysis.plots import explain_data, save_figure

            save_figure(read.plot(), path, explain_data(read))
    print(answer)
    if path is not None:
        typer.echo(f"Figure: {shown_path(path)}", err=as_json)
    if not (full or latex or as_json):
        typer.echo("More, with where it was tried and where training ends: --full")


@app.command()
def check(loss: Loss, as_json: Json = False) -> None:
    """Check how a loss is implemented: accumulation, evaluation, padding, packing, masks, shift, precision, limits.

    Exit code 1 if something fails.
    """
    with redirect_stdout(sys.stderr):
        report = qlens.check(loss)
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def compare(
    variants: Annotated[
        str | None,
        typer.Option(
            help="Specs, FILE.py:FUNCTIONs, controls, and the groups default and controls; comma-separated.",
            show_default="default: base and six methods",
        ),
    ] = None,
    settings: Annotated[
        str | None,
        typer.Option(help="Lab settings, comma-separated, or all.", show_default=LAB_SETTINGS),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.", show_default="the setting's")] = None,
    model: Folder = None,
    teacher: Folder = None,
    data: Data = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="The run folder.", show_default="runs/<configuration>")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the trained models.")] = False,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="One for all methods.", show_default="the recorded ones; own model: 5e-5, 1e-3 under 10 M parameters"
        ),
    ] = None,
    lr_grid: Annotated[
        bool,
        typer.Option("--lr-grid", help="Search the learning rate of what is not recorded, on validation problems."),
    ] = False,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...", show_default="float32")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Parallel processes.", show_default="all cores")] = None,
    as_json: Json = False,
) -> None:
    """Train methods side by side, in the embedded lab or on your own model, and write a run folder.

    The same command goes on where it was stopped. Exit code 1 if a job failed: its traceback is in the run folder.
    """
    if model is None and (beside := [n for n, v in (("--device", device), ("--dtype", dtype)) if v is not None]):
        raise InputError(f"{beside[0]} goes with --model DIR --data FILE: the lab runs on the CPU in float32")
    if settings is not None and any(each is not None for each in (model, teacher, data)):
        raise InputError("--settings are the lab's: leave them out with --model, --teacher and --data")
    study = qlens.compare(
        None if variants is None else params.split_specs(variants),
        settings=params.split_specs(LAB_SETTINGS if settings is None else settings),
        seeds=seeds,
        steps=steps,
        model=model,
        teacher=teacher,
        data=data,
        out=out,
        save=save,
        learning_rate=learning_rate,
        lr_grid=lr_grid,
        device="cpu" if device is None else device,
        dtype="float32" if dtype is None else dtype,
        jobs=jobs,
    )
    print(study.table().to_json(orient="records", indent=2) if as_json else study)
    if study.config["noted"]["failed"]:
        raise typer.Exit(1)


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
        bool, typer.Option("--rank", help="Order tokens and rows by how little the targets trust their labels.")
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
    """Show token by token what each target wants, as one HTML file; or rank what the targets trust least."""
    unasked = None if rank or as_json else "view.html"
    path = unasked if out is None else out
    path = None if path is None else output_file(path, "--out")
    from qlens.data.rows import ignored_keys

    with redirect_stdout(sys.stderr):
        loaded, rows_read = own_models(
            model, teacher, reference, data, "cpu" if device is None else device, dtype, text
        )
        made = qlens.view(
            **loaded,
            text=rows_read,
            variants=None if variants is None else params.split_specs(variants),
            candidates=1 if path is None else candidates,
            rows=rows or (None if rank else 8),
        )
        if path is not None:
            (made.top(top) if rank else made).save(path)
    typer.echo(f"{made}; {len(made.skipped)} rows left out", err=True)
    if data is not None and (ignored := ignored_keys(rows_read)):
        typer.echo(f"{data}: keys that are ignored: {', '.join(ignored)}", err=True)
    if rank:
        print(made.rank().to_jsonl(top) if as_json else made.rank().table(top))
    elif as_json:
        print(made.to_jsonl())
    if path is not None:
        typer.echo(f"View: {shown_path(path)} ({path.stat().st_size / 1e6:.1f} MB)", err=as_json)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    sys.exit(console.run(app, sys.argv[1:]))
