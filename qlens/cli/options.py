"""The application and the options that several verbs share."""

from typing import Annotated

import typer

from qlens.cli.inputs import ROWS

app = typer.Typer(
    help="See and design the target distribution behind any supervised fine-tuning loss.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[str | None, typer.Option(metavar="DIR", help="A Hugging Face model folder.", show_default="none")]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE",
        help="JSON Lines, JSON, CSV or Parquet: messages, prompt/completion, question/answer, ShareGPT, Alpaca, chosen/rejected, "
        "text; a folder of such files; or NAME:SPLIT on the Hugging Face hub.",
        show_default="none",
    ),
]
PromptColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The prompt's column in --data.", show_default="by the columns there are"),
]
CompletionColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The column to learn; CHOSEN,REJECTED for pairs.", show_default="by the columns there are"
    ),
]
OnBad = Annotated[
    str | None,
    typer.Option(
        metavar="error|drop", help="What becomes of rows of --data that cannot be used.", show_default="error"
    ),
]
Device = Annotated[str | None, typer.Option(help="Where models run: cpu, cuda, ...", show_default="cpu")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, ...", show_default="float32 on a CPU, else as saved")
]
Rows = Annotated[int | None, typer.Option(min=1, help="How many rows of the data to read.", show_default=str(ROWS))]
Loss = Annotated[str, typer.Argument(help="A method's spec, like dft or kd(temperature=2.0), or FILE.py:FUNCTION.")]
