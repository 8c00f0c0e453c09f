"""Rules on the call itself: strided input, repeatable results, no argument modified."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from qlens.conformance.harness import TOLERANCE, Reading, Specimen
from qlens.conformance.rules.ignored_rows import among, knows_labels
from qlens.conformance.rules.rule import Failed, Remark, relative, rule, same, sees_no_batches, to
from qlens.conformance.synthetic_batches import count
from qlens.conformance.wrappers import changing, watching
from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE


@rule("it trains on wrong numbers after a transpose or a slice")
def contiguous(loss: Specimen) -> str:
    """Non-contiguous input gives the same gradient."""
    texts = loss.texts((5, 5)) if loss.laid_out else []  # the strides of a single text hide from view()

    def read(change: Callable[[Tensor], Tensor]) -> Reading:
        if texts:
            return loss.read_batch(texts, count(texts), around=changing(change))
        return loss.read(loss.tokens(), changing(change))

    expected = read(Tensor.contiguous)
    try:
        reading = read(_strided)
    except InputError as error:
        raise Remark(f"non-contiguous logits and labels, as after a transpose or a slice: {error}") from error
    off = same(loss, reading, expected, "non-contiguous logits and labels")
    return f"non-contiguous logits and labels give the same gradient {to(off)}"


@rule("runs cannot be repeated, nor losses compared: seed it, or switch dropout off", compares=False)
def deterministic(loss: Specimen) -> str:
    """Two calls agree."""
    first, second = (loss.read(loss.tokens()) for _ in range(2))
    off = max(relative(second.grad, first.grad), relative(second.value, first.value))
    if off > TOLERANCE:
        raise Failed(f"two calls on the same input differ by {off:.2g} of the largest gradient")
    return f"two calls agree {to(off)}"


@rule("metrics, or a second loss on the same logits, see the modified values", compares=False)
def inputs(loss: Specimen) -> str:
    """No argument is modified in place."""
    written: list[str] = []
    loss.read(loss.tokens(), watching(written))
    with contextlib.suppress(InputError):  # its treatment of -100 is another rule
        if loss.laid_out and not sees_no_batches(loss):
            texts = loss.unequal()
            loss.read_batch(texts, count(texts), columns=3, around=watching(written))
        elif knows_labels(loss):
            among(loss, IGNORE, watching(written))
    if written:
        raise Failed(f"it writes in place on {', '.join(dict.fromkeys(written))}")
    return "no argument is modified"


def _strided(value: Tensor) -> Tensor:
    """The same values, laid out with gaps between them, the vocabulary not innermost."""
    if not value.ndim:
        return value
    spread = torch.stack([value, value], -1)[..., 0]
    return spread if value.ndim < 2 else value.transpose(-1, -2).contiguous().transpose(-1, -2)
