"""Evaluation data: whether an evaluation in the middle of training will have a loss, seen before the first step."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.segments import Pairs
from qlens.core.supervised import LAYOUT, Supervised
from qlens.core.tokens import Tokens
from qlens.core.tokens.fields import check_ids, checked_field
from qlens.data.collator import COLUMNS
from qlens.registry import Variant


def no_supervised_token(name: str) -> InputError:
    """The error for an evaluation set that has no loss."""
    return InputError(
        f"the evaluation set ({name}) has no supervised token, so that it has no loss: give eval_dataset rows with labels "
        "other than -100 after their first token"
    )


def check_evaluation_data(
    name: str, batches: Iterable[Mapping[str, Any]], variant: Variant, vocabulary: int | None
) -> None:
    """Whether a method has a loss on the batches of an evaluation set; the first ones are read, up to a supervised token.

    Args:
        name: of the set, "eval" or "eval_..." as in its metrics.
        batches: as the data loader gives them.
        variant: the method.
        vocabulary: the number of entries of the model's logits; None where it is not known.

    Raises:
        InputError: a batch lacks labels or a column that the method needs, or holds labels outside the vocabulary or half
            a pair; or no token is supervised.
    """
    empty = True
    try:
        for batch in batches:
            empty = False
            if _has_loss(batch, variant, vocabulary):
                return
    except InputError as error:
        raise InputError(f"the evaluation set ({name}): {error}") from error
    if not empty:
        raise no_supervised_token(name)


def _has_loss(batch: Mapping[str, Any], variant: Variant, vocabulary: int | None) -> bool:
    """Whether a batch has supervised tokens, and what the method needs from the data at them."""
    where = Supervised.of({key: value for key, value in batch.items() if key in LAYOUT})
    if not len(where):
        return False
    if vocabulary is not None:
        check_ids(where.labels, vocabulary)
    fields: dict[str, Tensor] = {}
    for column in COLUMNS:
        if column in batch:
            value = where.at_labels(batch[column].to(where.labels.device))
            fields[column] = checked_field(column, value, (len(where),))
        elif column in variant.needs:
            raise InputError(f"{variant.name} needs {column!r}: give the data a column of that name")
    if "pair" in variant.needs and "chosen" in variant.needs:
        logits = torch.zeros(len(where), 1, device=where.labels.device)
        Pairs.of(Tokens.unchecked(logits=logits, labels=torch.zeros_like(where.labels), **fields))
    return True
