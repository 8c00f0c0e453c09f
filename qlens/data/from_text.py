"""Tokens of texts: the predictions of models at their supervised positions."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlens.core.errors import InputError
from qlens.core.numerics import row_blocks, spread
from qlens.core.tokens import Tokens
from qlens.data.collator import collate
from qlens.data.compatibility import check_model, context_length, vocabulary_size
from qlens.data.examples import encode
from qlens.data.models import check_token_ids, load_to_read, loaded, loaded_once
from qlens.data.supervised_batch import SupervisedBatch
from qlens.data.vocabularies import Vocabularies
from qlens.engine.models.backbones import Backbones
from qlens.engine.models.causality import check_causal
from qlens.engine.models.forward import evaluating, model_logits

ENTRIES = 2**22  # logits of one model at a time, where little of them is kept


def tokens_from_text(
    model: nn.Module | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    teacher: nn.Module | str | Path | None = None,
    reference: nn.Module | str | Path | None = None,
    batch_size: int = 8,
    needs: Collection[str] = (),
) -> Tokens:
    """Tokens at every supervised position of texts, (prompt, completion) pairs, or rows as ``encode`` takes them.

    Args:
        model: a causal language model, or the path of one, which is read as ``load_to_read`` says; a loaded one runs on its own
            device.
        tokenizer: of the model.
        rows: texts, pairs, or dicts.
        teacher, reference: other models over the same tokenizer, or their paths; see ``Vocabularies`` for padding.
        batch_size: rows per forward pass.
        needs: as in ``tokens_from_examples``.

    Returns:
        The tokens, without gradients.

    Raises:
        InputError: rows that ``encode`` or ``tokens_from_examples`` refuse.

    Example:
        >>> tokens_from_text("path/to/model", tokenizer, [("2 + 2 =", "4")])  # doctest: +SKIP
    """
    if isinstance(rows, Sized) and not len(rows):
        raise InputError("rows must be a non-empty list of texts, (prompt, completion) pairs or rows of data")
    examples = encode(rows, tokenizer).examples
    return tokens_from_examples(
        model, examples, teacher=teacher, reference=reference, batch_size=batch_size, needs=needs, tokenizer=tokenizer
    )


def tokens_from_examples(
    model: nn.Module | str | Path,
    examples: Sequence[dict[str, list[int]]],
    teacher: nn.Module | str | Path | None = None,
    reference: nn.Module | str | Path | None = None,
    batch_size: int = 8,
    needs: Collection[str] = (),
    most: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Tokens:
    """Tokens at every supervised position of encoded rows, without gradients.

    Args:
        model: a causal language model, or the path of one; it runs in evaluation mode, on its own device.
        examples: as ``encode`` returns them.
        teacher, reference: other models over the same tokenizer, or their paths; see ``Vocabularies`` for padding.
        batch_size: rows per forward pass.
        needs: other inputs of a method (``variant.needs``): ``negatives`` are the tokens before a label in its own text,
            ``old`` and ``second`` the model's own pass, as right after a sync and without dropout.
        most: number of tokens at most, evenly spread over all; the logits of the others are never whole.
        tokenizer: of the model, to compare with those of the others; by default the one beside it.

    Returns:
        The tokens.

    Raises:
        InputError: a row beyond a model's context or vocabulary, models whose vocabularies differ, or one that is not causal.
    """
    model = loaded(model, "model", load=load_to_read)
    check_model(model, "model")
    other_models = loaded_once({"teacher": teacher, "reference": reference}, model.device, load_to_read)
    vocabularies = Vocabularies()
    for name, other in other_models.items():
        vocabularies.check(model, other, name, tokenizer)
    check_fits(examples, {"model": model, **other_models})
    chosen = None
    if most is not None and (total := supervised_tokens(examples)) > most:
        chosen = spread(total, most)
    entries = None if chosen is None else ENTRIES
    batches = token_batches(
        model, examples, batch_size, needs, entries, chosen=chosen, vocabularies=vocabularies, **other_models
    )
    parts = [tokens.fields() for tokens in batches]
    return Tokens(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def supervised_tokens(examples: Sequence[Mapping[str, Sequence[int]]]) -> int:
    """The number of supervised tokens of encoded rows."""
    return sum(len(SupervisedBatch(collate([example]))) for example in examples)


def token_batches(
    model: nn.Module,
    examples: Sequence[Mapping[str, Sequence[int]]],
    batch_size: int,
    needs: Collection[str] = (),
    entries: int | None = None,
    backbones: Backbones | None = None,
    chosen: Int[Tensor, " n"] | None = None,
    vocabularies: Vocabularies | None = None,
    **other_models: nn.Module,
) -> Iterator[Tokens]:
    """``tokens_from_examples`` batch by batch; ``sequence`` counts on from batch to batch.

    Args:
        model, examples, batch_size, needs: as there; models are loaded.
        entries: most logits of a model at a time, where it has a linear head; None: those of a batch.
        backbones: those of the models in earlier calls, which are not verified again.
        chosen: the supervised tokens that are read, by their number over all examples; None: all of them. Batches without one
            are not run.
        vocabularies: those of the other models in earlier calls, which are not logged again.
        other_models: teacher and reference.
    """
    backbones, numbered = Backbones(None) if backbones is None else backbones, 0
    vocabularies = vocabularies or Vocabularies()
    models, vocabulary = {"model": model, **other_models}, vocabulary_size(model)
    for start in range(0, len(examples), batch_size):
        batch = _on(model.device, collate(examples[start : start + batch_size]))
        supervised = SupervisedBatch(batch)
        first, numbered = numbered, numbered + len(supervised)
        index = None if chosen is None else chosen[(chosen >= first) & (chosen < numbered)] - first
        if index is not None and not len(index):
            continue
        batch, logits, passes = supervised.model_inputs(), {}, {}
        for name, each in models.items():
            if id(each) in passes:
                logits[name] = passes[id(each)]
                continue
            if vocabulary_size(each) < vocabulary:
                check_token_ids(each, batch, name)
            with evaluating(each):
                check_causal(each, _on(each.device, batch), name)
                read = _logits(each, _on(each.device, batch), supervised, entries and backbones, name)
                logits[name] = passes[id(each)] = partial(_fitted, read, vocabulary, name, vocabularies)
        number = max(len(supervised) if index is None else len(index), 1)
        for block in row_blocks(number, vocabulary, entries or vocabulary * number):
            rows = block if index is None else index[block].to(model.device)
            with torch.no_grad():  # not across yield: the caller may compute gradients meanwhile
                fields = {name: read(rows).to(model.device) for name, read in logits.items()}
            fields["logits"] = fields.pop("model")
            fields |= {name: fields["logits"] for name in ("old", "second") if name in needs}
            if "negatives" in needs:
                fields["negatives"] = supervised.context(batch["input_ids"], fields["logits"].shape[1], rows)
            fields |= {name: values[rows] for name, values in supervised.columns.items()}
            yield Tokens(labels=supervised.labels[rows], sequence=start + supervised.sequence[rows], **fields)


def _logits(
    model: nn.Module,
    batch: dict[str, Tensor],
    supervised: SupervisedBatch,
    backbones: Backbones | None,
    name: str,
) -> Callable[[slice | Tensor], Tensor]:
    """A function that returns a model's logits at some supervised rows, computed on demand where it has a backbone."""
    states = backbones.states(model, batch, name) if backbones else None
    if states is None:
        whole = supervised.take(model_logits(model, batch))
        return lambda rows: whole[_there(rows, whole.device)]
    backbone, hidden = states
    head = backbone.at(supervised.take(hidden))
    return lambda rows: head.logits(_there(rows, hidden.device))


def _fitted(
    read: Callable[[slice | Tensor], Tensor],
    vocabulary: int,
    name: str,
    vocabularies: Vocabularies,
    rows: slice | Tensor,
) -> Tensor:
    """A model's logits at some supervised rows, over the vocabulary of the model that is read."""
    logits = read(rows)
    return logits if name == "model" else vocabularies.fitted(logits, vocabulary, name)


def _there(rows: slice | Tensor, device: torch.device) -> slice | Tensor:
    return rows if isinstance(rows, slice) else rows.to(device)


def _on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def check_fits(examples: Sequence[Mapping[str, Sequence[int]]], models: Mapping[str, nn.Module]) -> None:
    """Check that encoded rows are within the context and vocabulary of every model.

    Raises:
        InputError: a row is not; the model is named.
    """
    for name, model in models.items():
        limit, size = context_length(model), vocabulary_size(model)
        for number, example in enumerate(examples, 1):
            ids = example["input_ids"]
            if limit is not None and len(ids) > limit:
                raise InputError(f"row {number} has {len(ids)} tokens, but the {name}'s context is {limit}")
            if max(ids) >= size:
                raise InputError(f"row {number} has a token {max(ids)}, but the {name}'s vocabulary is {size}")
