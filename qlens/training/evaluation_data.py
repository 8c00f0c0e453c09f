"""Evaluation data: check before the first step that evaluations in training will have a loss."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.segments import Pairs
from qlens.core.tokens import Tokens
from qlens.core.tokens.fields import check_ids, checked_field
from qlens.data.collator import COLUMNS
from qlens.data.supervised_batch import SupervisedBatch
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
    """Check that a method has a loss on an evaluation set; batches are read up to the first supervised token.

    Args:
        name: of the set, "eval" or "eval_..." as in its metrics.
        batches: as the data loader gives them.
        variant: the method.
        vocabulary: the number of entries of the model's logits; None supervised it is not known.

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
    """Whether a batch has supervised tokens; the columns that the method needs are checked at them."""
    supervised = SupervisedBatch(batch)
    if not len(supervised):
        return False
    if vocabulary is not None:
        check_ids(supervised.labels, vocabulary)
    fields: dict[str, Tensor] = {}
    for column in COLUMNS:
        if column in supervised.columns:
            fields[column] = checked_field(column, supervised.columns[column], (len(supervised),))
        elif column in variant.needs:
            raise InputError(f"{variant.name} needs {column!r}: give the data a column of that name")
    if "pair" in variant.needs and "chosen" in variant.needs:
        logits = torch.zeros(len(supervised), 1, device=supervised.labels.device)
        Pairs.of(Tokens.unchecked(logits=logits, labels=torch.zeros_like(supervised.labels), **fields))
    return True
