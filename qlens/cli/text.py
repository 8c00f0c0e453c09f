"""Data as text: ``qlens view --text-only``."""

import json

import typer

from qlens.cli.inputs import Source
from qlens.core.errors import InputError

SHOWN = 3  # rows that are printed by default


def show_text(model: str | None, source: Source, text: str | None, rows: int | None, as_json: bool) -> None:
    """Print the first rows as the model gets them, with what is learned between ⟦ and ⟧, and the report on all rows.

    Raises:
        InputError: no model folder or no data.
    """
    data, *columns = source
    if model is None or (data is None) == (text is None):
        raise InputError("--text-only needs --model, whose tokenizer is used, and either --data or --text")
    from qlens.data import encode, load_rows, models

    loaded = [text] if data is None else load_rows(data, None, *columns)
    encoded = encode(loaded, models.load_tokenizer(model), on_bad="drop")
    if as_json:
        return print(json.dumps(encoded.report.to_dict(), indent=2))
    print(encoded.preview(rows or SHOWN))
    typer.echo(str(encoded.report), err=True)
