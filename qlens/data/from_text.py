"""Reading: what models predict at the supervised positions of texts, as Tokens."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qlens.core.errors import InputError
from qlens.core.numerics import spread
from qlens.core.supervised import Supervised
from qlens.core.tokens import Tokens
from qlens.data.collator import COLUMNS, collate
from qlens.data.compatibility import check_model, check_same_vocabulary, context_length, vocabulary_size
from qlens.data.examples import Row, encode
from qlens.engine.backbone import Bodies
from qlens.engine.forward import evaluating, model_logits
from qlens.engine.verification.causality import check_causal

ENTRIES = 2**22  # logits of one model at a time, where little of them is kept


def tokens_from_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[str | tuple[str, str] | Row],
    teacher: nn.Module | None = None,
    reference: nn.Module | None = None,
    batch_size: int = 8,
    needs: Collection[str] = (),
) -> Tokens:
    """Tokens at every supervised position of texts, (prompt, completion) pairs, or rows as ``encode`` takes them.

    The other arguments are those of ``tokens_from_examples``; ``tokenizer`` is the model's.

    Raises:
        InputError: rows that ``encode`` or ``tokens_from_examples`` refuse.
    """
    if isinstance(rows, str) or not len(rows):
        raise InputError("rows must be a non-empty list of texts, (prompt, completion) pairs or rows of data")
    examples = encode([row_of(row) for row in rows], tokenizer, None).examples
    return tokens_from_examples(
        model, examples, teacher=teacher, reference=reference, batch_size=batch_size, needs=needs
    )


def tokens_from_examples(
    model: nn.Module,
    examples: Sequence[dict[str, list[int]]],
    teacher: nn.Module | None = None,
    reference: nn.Module | None = None,
    batch_size: int = 8,
    needs: Collection[str] = (),
    most: int | None = None,
) -> Tokens:
    """Tokens at every supervised position of encoded rows: what the model, and others, predict there; no gradient.

    Args:
        model: a causal language model; it is run in evaluation mode, on its own device.
        examples: as ``encode`` makes them.
        teacher, reference: other models over the same vocabulary.
        batch_size: rows per forward pass.
        needs: what a method asks for beside (``variant.needs``): ``negatives`` are the tokens before a label in its own text,
            ``old`` and ``second`` the model's own pass, as right after a refresh and without dropout.
        most: of more tokens than these, only so many, spread evenly over all; the logits of the others are never whole.

    Raises:
        InputError: a row beyond a model's context or vocabulary, models whose vocabularies differ, or one that is not causal.
    """
    others = {name: other for name, other in (("teacher", teacher), ("reference", reference)) if other is not None}
    check_model(model, "model")
    for name, other in others.items():
        check_same_vocabulary(model, other, name)
    check_fits(examples, {"model": model, **others})
    counts = [len(Supervised.of(collate([example]))) for example in examples] if most is not None else []
    kept = set(spread(sum(counts), most).tolist()) if most is not None and sum(counts) > most else None
    parts, seen = [], 0
    for tokens in token_batches(model, examples, batch_size, needs, None if kept is None else ENTRIES, **others):
        rows = [row for row in range(len(tokens)) if kept is None or seen + row in kept]
        seen += len(tokens)
        parts.append((tokens if kept is None else tokens[rows]).fields())
    return Tokens(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def token_batches(
    model: nn.Module,
    examples: Sequence[Mapping[str, Sequence[int]]],
    batch_size: int,
    needs: Collection[str] = (),
    entries: int | None = None,
    **others: nn.Module,
) -> Iterator[Tokens]:
    """The same, some whole rows at a time, so that no text is too long; ``sequence`` goes on from batch to batch.

    With ``entries``, so many logits of a batch at a time: of models with a linear head no others ever exist.
    """
    bodies = Bodies(None)
    with ExitStack() as frozen:
        for each in (model, *others.values()):
            frozen.enter_context(evaluating(each))
        for start in range(0, len(examples), batch_size):
            batch = _on(model.device, collate(examples[start : start + batch_size]))
            supervised = Supervised.of(batch)
            del batch["labels"]
            columns = {name: supervised.at_labels(batch.pop(name)) for name in COLUMNS if name in batch}
            for name, each in {"model": model, **others}.items():
                check_causal(each, _on(each.device, batch), name)
            logits = {"logits": _logits(model, batch, supervised, entries and bodies, "model")}
            for name, other in others.items():
                logits[name] = _logits(other, _on(other.device, batch), supervised, entries and bodies, name)
            vocabulary = vocabulary_size(model)
            size = max(len(supervised) if entries is None else entries // vocabulary, 1)
            for at in range(0, max(len(supervised), 1), size):
                rows = slice(at, at + size)
                fields = {name: read(rows).to(model.device) for name, read in logits.items()}
                fields |= {name: fields["logits"] for name in ("old", "second") if name in needs}
                if "negatives" in needs:
                    fields["negatives"] = supervised.context(batch["input_ids"], fields["logits"].shape[1], rows)
                fields |= {name: values[rows] for name, values in columns.items()}
                yield Tokens(labels=supervised.labels[rows], sequence=start + supervised.sequence[rows], **fields)


def _logits(
    model: nn.Module, batch: dict[str, torch.Tensor], supervised: Supervised, bodies: Bodies | None, name: str
) -> Callable[[slice], torch.Tensor]:
    """A model's logits at some of the supervised positions, made when asked for where it has a body."""
    states = bodies.states(model, batch, name) if bodies else None
    if states is None:
        whole = supervised.take(model_logits(model, batch))
        return lambda rows: whole[rows]
    body, hidden = states
    return body.of(supervised.take(hidden)).logits


def _on(device: torch.device, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def row_of(row: Any) -> Any:
    """A row of data from a text or a (prompt, completion) pair; anything else as it is."""
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, (tuple, list)) and len(row) == 2:
        return {"prompt": row[0], "completion": row[1]}
    return row


def check_fits(examples: Sequence[Mapping[str, Sequence[int]]], models: Mapping[str, nn.Module]) -> None:
    """Whether encoded rows fit every model, by name.

    Raises:
        InputError: a row beyond a model's context or vocabulary.
    """
    for name, model in models.items():
        limit, size = context_length(model), vocabulary_size(model)
        for number, example in enumerate(examples, 1):
            ids = example["input_ids"]
            if limit is not None and len(ids) > limit:
                raise InputError(f"row {number} has {len(ids)} tokens, but the {name}'s context is {limit}")
            if max(ids) >= size:
                raise InputError(f"row {number} has a token {max(ids)}, but the {name}'s vocabulary is {size}")
