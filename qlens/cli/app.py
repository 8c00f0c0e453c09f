"""The verbs on losses, training and text, and the entry point; each verb is a few lines over the library."""

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

import qlens
from qlens.cli import console, methods  # noqa: F401  methods registers list and show
from qlens.cli.inputs import figure_path, own_models, own_tokens, slug
from qlens.cli.options import Data, Device, Dtype, Folder, Json, Loss, Rows, app
from qlens.core.errors import InputError
from qlens.core.files import output_file, shown_path
from qlens.registry import params

LAB_SETTINGS = "strong-prior,weak-prior"


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
        bool,
        typer.Option(
            "--full",
            help="Print also trust, simplex, scope, other vocabularies, the range covered and the fixed point.",
        ),
    ] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print the table as LaTeX.")] = False,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Explain the target Q = p - g of a loss, on built-in probes or on your own model and text."""
    with redirect_stdout(sys.stderr):  # keep what a user's file prints out of the answer
        variant = qlens.get(loss)
        default = None if as_json or latex else f"explain-{slug(loss)}.png"
        path = default if figure is None else figure
        path = None if path is None else figure_path(path)
        thin = variant.scope == "token"
        where = own_tokens(model, teacher, reference, data, rows, device, dtype, variant.needs, thin=thin)
        result = qlens.explain(variant, **where)
        answer = (
            result.to_latex() if latex else json.dumps(result.to_dict(), indent=2) if as_json else result.text(full)
        )
        if path is not None:
            from qlens.analysis.plots import explain_data, save_figure

            save_figure(result.plot(), path, explain_data(result))
    print(answer)
    if path is not None:
        typer.echo(f"Figure: {shown_path(path)}", err=as_json)
    if not (full or latex or as_json):
        typer.echo("--full adds trust, simplex, scope, other vocabularies, the range covered and the fixed point")


@app.command()
def check(loss: Loss, as_json: Json = False) -> None:
    """Check the implementation of a loss: accumulation, evaluation, padding, packing, masks, shift, precision, limits.

    Exit code 1 if a rule fails.
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
        typer.Option("--lr-grid", help="Search learning rates that are not recorded, on validation problems."),
    ] = False,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...", show_default="float32")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Parallel processes.", show_default="all cores")] = None,
    as_json: Json = False,
) -> None:
    """Train methods side by side, in the embedded lab or on your own model, and write a run folder.

    The same command resumes a stopped run. Exit code 1 if a job failed: its traceback is in the run folder.
    """
    if model is None and (extra := [n for n, v in (("--device", device), ("--dtype", dtype)) if v is not None]):
        raise InputError(f"{extra[0]} goes with --model DIR --data FILE: the lab runs on the CPU in float32")
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


def main() -> None:
    """Run the command line; a usage error is one line and exit code 2."""
    sys.exit(console.run(app, sys.argv[1:]))
