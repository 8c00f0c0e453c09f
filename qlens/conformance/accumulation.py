"""The rule of gradient accumulation: micro-batches add up to the whole batch, or by which factor they do not."""

from collections.abc import Callable

import torch
from torch import Tensor

from qlens.adapters import find_reduction
from qlens.conformance.rules import ROWS_ONLY, Failed, NotApplicable, factor, relative, rule, to
from qlens.conformance.specimen import COUNT, Specimen
from qlens.conformance.texts import PROMPTS, UNEQUAL, Text, count
from qlens.errors import InputError

EQUAL = (6,) * 8  # predicted labels: what forgets the count is then off by exactly the number of micro-batches
SPLITS = {"2x4": 4, "8x1": 1}  # micro-batches x texts in each
DIVISORS = {
    "labels": count,
    "positions": lambda texts: len(texts) * max(len(text.labels) for text in texts),
    "texts": len,
}


@rule("training with gradient accumulation learns at another rate, and weighs texts in small micro-batches more")
def accumulation(loss: Specimen) -> str:
    """Micro-batches add up to the whole batch."""
    if not loss.laid_out:
        raise NotApplicable(f"{ROWS_ONLY}{_remark(loss)}")
    if loss.scope in ("batch", "pair"):
        raise NotApplicable(f"scope {loss.scope}: a token's gradient depends on the rest of its micro-batch by design")
    told = "" if loss.counted else f"it takes no {COUNT}: "
    designs = {"equal": loss.texts(EQUAL), "unequal": loss.texts(UNEQUAL, PROMPTS)}
    offs, factors = [], {}
    for design, texts in designs.items():
        whole = _accumulated(loss, texts, len(texts))
        for name, size in SPLITS.items():
            split = _accumulated(loss, texts, size)
            offs += [relative(torch.cat(split), torch.cat(whole))]
            factors[design, name] = [factor(loss, *pair) for pair in zip(split, whole, strict=True)]
    if max(offs) <= loss.tolerance:
        return f"1x8, 2x4 and 8x1 micro-batches give the same gradient {to(max(offs))}"
    if any(None in by_text for by_text in factors.values()):
        raise Failed(
            f"{told}2x4 or 8x1 is off by {max(offs):.2g} of the largest gradient of 1x8, by no factor per text"
        )
    equal, unequal = ([_span(factors[design, name]) for name in SPLITS] for design in designs)
    whose = [name for name, divisor in DIVISORS.items() if _divided(loss, designs, factors, divisor)]
    why = f": it divides by the {whose[0]} of each micro-batch" if whose else ""
    raise Failed(
        f"{told}2x4 gives {equal[0]} and 8x1 {equal[1]} times the gradient of 1x8 "
        f"(unequal texts: {unequal[0]} and {unequal[1]} times){why}"
    )


def _accumulated(loss: Specimen, texts: list[Text], size: int) -> list[Tensor]:
    """The gradient of every text, in micro-batches of ``size`` texts that are told the count of the whole batch."""
    n = count(texts)
    parts = [loss.read_batch(texts[i : i + size], n).grad for i in range(0, len(texts), size)]
    return list(torch.cat(parts).split([len(text.labels) for text in texts]))


def _divided(loss: Specimen, designs: dict, factors: dict, divisor: Callable[[list[Text]], int]) -> bool:
    """Whether every factor is the count of the whole batch over that of the text's own micro-batch."""
    for (design, name), found in factors.items():
        texts, size = designs[design], SPLITS[name]
        for i, got in enumerate(found):
            wanted = divisor(texts) / divisor(texts[i - i % size :][:size])
            if abs(got / wanted - 1) > loss.tolerance:
                return False
    return True


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}"


def _remark(loss: Specimen) -> str:
    """A warning to who accumulates a loss that returns one number for its rows."""
    if loss.read(loss.tokens()).shape:
        return ""
    try:
        found = find_reduction(loss.fn, loss.params, loss.tokens(), loss.variant.spec)
    except InputError as error:
        return f" (remark: {error})"
    return "" if found == "sum" else " (remark: it returns the mean over its rows, which whoever accumulates must undo)"
