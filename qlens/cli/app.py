"""The verbs on losses and training, and the entry point; each verb is a few lines over the library."""

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

import qlens
from qlens.cli import console, methods, view  # noqa: F401  methods registers list and show, view registers view
from qlens.cli.inputs import Source, figure_path, own_tokens, slug
from qlens.cli.options import CompletionColumn, Data, Device, Dtype, Folder, Json, Loss, OnBad, PromptColumn, Rows, app
from qlens.core.errors import InputError
from qlens.core.files import shown_path
from qlens.registry import params

LAB_SETTINGS = "strong-prior,weak-prior"


@app.command()
def explain(
    loss: Loss,
    model: Folder = None,
    teacher: Folder = None,
    reference: Folder = None,
    data: Data = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    on_bad: OnBad = None,
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
        where = own_tokens(
            model,
            teacher,
            reference,
            Source(data, prompt_column, completion_column, on_bad),
            rows,
            device,
            dtype,
            variant.needs,
            thin,
        )
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
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    on_bad: OnBad = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="The run folder.", show_default="runs/<configuration>")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the trained models.")] = False,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="One for all methods.",
            show_default="the recorded ones; own model: 5e-5, LoRA 5e-4, 1e-3 under 10 M parameters",
        ),
    ] = None,
    lr_grid: Annotated[
        bool,
        typer.Option("--lr-grid", help="Search learning rates that are not recorded, on validation problems."),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of an optimizer step on your own model.", show_default="16")
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a forward pass, a divisor.", show_default="the batch size")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="The most tokens of a row.", show_default="what the models take")
    ] = None,
    on_long: Annotated[
        str | None,
        typer.Option(
            metavar="drop|truncate_left|truncate_right|error", help="What becomes of longer rows.", show_default="drop"
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train LoRA adapters of this rank only.", show_default="all weights")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice, to hold fewer of them.")
    ] = False,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="A chat template (jinja).", show_default="the tokenizer's")
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of products: float32, bfloat16, float16. Trained weights are float32.", show_default="float32"
        ),
    ] = None,
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
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        max_length=max_length,
        on_long=on_long,
        lora_rank=lora_rank,
        gradient_checkpointing=gradient_checkpointing,
        chat_template=chat_template,
        prompt_column=prompt_column,
        completion_column=completion_column,
        on_bad=on_bad,
        device="cpu" if device is None else device,
        dtype="float32" if dtype is None else dtype,
        jobs=jobs,
    )
    print(study.table().to_json(orient="records", indent=2) if as_json else study)
    if study.config["noted"]["failed"]:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; a usage error is one line and exit code 2."""
    sys.exit(console.run(app, sys.argv[1:]))
