"""Models and text of a command: folders and files, loaded."""

from pathlib import Path
from typing import Any, NamedTuple

import typer

from qlens.core.errors import InputError


class Source(NamedTuple):
    """The options that say which rows are read: the place of the data, columns of prompt and completion, and bad rows."""

    data: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    on_bad: str | None = None


ROWS = 32  # rows of the data that are read by default
LOOKED_AT = 512  # rows of the data that are encoded at least
MOST = 2**26  # logits of one model that are read as a whole


def own_tokens(
    model: str | None,
    teacher: str | None,
    reference: str | None,
    source: Source,
    rows: int | None,
    device: str | None,
    dtype: str | None,
    needs: tuple[str, ...],
    thin: bool = True,
) -> dict[str, Any]:
    """The arguments ``tokens`` and ``token_text`` of explain for a model and a text; none where neither is named.

    ``thin``: of more than ``MOST`` logits, read evenly spread tokens only; not for losses of whole texts.
    """
    data, prompt, completion, on_bad = source
    if all(each is None for each in (model, data, teacher, reference)):
        options = {"--rows": rows, "--device": device, "--dtype": dtype}
        options |= {"--prompt-column": prompt, "--completion-column": completion, "--on-bad": on_bad}
        if extra := [name for name, value in options.items() if value is not None]:
            raise InputError(f"{extra[0]} goes with --model DIR --data FILE: the built-in probes do not use it")
        return {}
    rows = rows or ROWS
    from qlens.data import compatibility, examples
    from qlens.data.from_text import tokens_from_examples

    for name, folder in (("teacher", teacher), ("reference", reference)):
        if name in needs and folder is None:
            raise InputError(f"the method needs a {name}: give --{name} DIR")
    loaded, data_rows = own_models(model, teacher, reference, source, "cpu" if device is None else device, dtype)
    tokenizer = loaded.pop("tokenizer")
    read = data_rows[: max(4 * rows, LOOKED_AT)]  # enough of them, even where some are too long
    encoded = examples.encode(read, tokenizer, compatibility.shortest_context(*loaded.values()))
    selected = encoded.examples[:rows]
    most = max(MOST // compatibility.vocabulary_size(loaded["model"]), 1) if thin else None
    tokens = tokens_from_examples(examples=selected, needs=needs, most=most, tokenizer=tokenizer, **loaded)
    counted = f"{len(selected)} of {len(data_rows)} rows read (--rows {rows})"
    typer.echo(f"{data}: {counted}; of the first {len(read)}: {encoded.report.line()}", err=True)
    if len(tokens) == most:
        typer.echo(f"{most} of these tokens are read, evenly spread: their logits alone are {MOST} numbers", err=True)
    return {"tokens": tokens, "token_text": tokenizer}


def own_models(
    model: str | None,
    teacher: str | None,
    reference: str | None,
    source: Source,
    device: str,
    dtype: str | None,
    text: str | None = None,
    after: str | None = None,
) -> tuple[dict[str, Any], Any]:
    """The models and the tokenizer by name, and the rows of the data, or the text given instead."""
    data, *columns = source
    if model is None or (data is None and text is None):
        raise InputError("--model and --data go together: a model folder and a data file")
    if data is not None and text is not None:
        raise InputError("--text and --data: give one of them")
    from qlens.data import models
    from qlens.data.rows import load_rows

    rows = text if data is None else load_rows(data, None, *columns)
    tokenizer = models.load_tokenizer(model)
    loaded = {"model": models.load_to_read(model, device, dtype), "tokenizer": tokenizer}
    for name, folder in (("teacher", teacher), ("reference", reference), ("after", after)):
        if folder is not None:
            try:
                remark = _add(loaded, name, folder, device, dtype)
            except InputError as error:
                raise InputError(f"--{name}: {error}") from error
            if remark:
                typer.echo(remark, err=True)
    return loaded, rows


def _add(loaded: dict[str, Any], name: str, folder: str, device: str, dtype: str | None) -> str:
    """Load another model with the vocabulary of ``loaded["model"]`` into ``loaded``; returns a sentence on its padding."""
    from qlens.data import compatibility, models
    from qlens.data.model_folders import has_tokenizer
    from qlens.data.vocabularies import match_vocabulary

    tokenizer = loaded["tokenizer"]
    own = name != "after" or has_tokenizer(folder)  # checkpoints of a training may come without one
    other = models.load_tokenizer(folder) if own else tokenizer
    compatibility.check_same_tokenizer(tokenizer, other)
    loaded[name] = models.load_to_read(folder, device, dtype)
    return match_vocabulary(compatibility.vocabulary_size(loaded["model"]), loaded[name], name, tokenizer, other)


def figure_path(figure: str) -> Path:
    """The path of ``--figure``, checked.

    Raises:
        InputError: no figure can be written there.
    """
    from qlens.analysis.plots.save import check_path

    return check_path(figure, "--figure")


def slug(spec: str) -> str:
    """A file name for a spec: letters, digits, - and _."""
    name = Path(spec.partition("(")[0]).name.replace(".py:", "-")
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)[:100]
