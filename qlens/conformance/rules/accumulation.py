"""Rules on the divisor of a loss: gradient accumulation, and evaluation without a count."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qlens.conformance.harness import COUNT, Specimen
from qlens.conformance.rules.rule import ROWS_ONLY, Failed, NotApplicable, Remark, factor, relative, rule, same, to
from qlens.conformance.synthetic_batches import Text, count, cut
from qlens.core.errors import InputError
from qlens.losses.reduction.scalar import find_reduction

EQUAL = (6,) * 8  # predicted labels; a loss that ignores the count is then off by the number of micro-batches
SPLITS = {"2x4": 4, "8x1": 1}  # micro-batches x texts in each
DIVISORS = {
    "labels": count,
    "positions": lambda texts: len(texts) * max(len(text.labels) for text in texts),
    "texts": len,
}
POWERS = {
    0: "each text's mean over tokens",
    0.5: "each text's sum over tokens divided by the root of its length",
    1: "each text's sum over tokens",
}
"""The loss of one text, by the power of its length with which it grows."""
PER_TEXT = 1e-3  # relative precision of text weights read from losses of one, two and three texts


@rule("training with gradient accumulation learns at another rate, and weighs texts in small micro-batches more")
def accumulation(loss: Specimen) -> str:
    """Micro-batches add up to the whole batch."""
    if not loss.laid_out:
        raise NotApplicable(f"{ROWS_ONLY}{_remark(loss)}")
    if loss.declared in ("batch", "pair"):
        raise NotApplicable(f"scope {loss.declared}: a token's gradient depends on its micro-batch by design")
    if loss.scope == "batch":
        raise Remark(
            "a token's gradient depends on the other texts of its micro-batch (seen by changing one text): "
            "micro-batches are no parts of one batch, whatever they are divided by"
        )
    uncounted = "" if loss.counted else f"it takes no {COUNT}: "
    designs = {"equal": loss.texts(EQUAL), "unequal": loss.unequal()}
    offs, factors = [], {}
    for design, texts in designs.items():
        whole = _accumulated(loss, texts, len(texts))
        for name, size in SPLITS.items():
            split = _accumulated(loss, texts, size)
            offs += [relative(torch.cat(split), torch.cat(whole))]
            factors[design, name] = _factors(loss, split, whole)
    if max(offs) <= loss.tolerance:
        return f"1x8, 2x4 and 8x1 micro-batches give the same gradient {to(max(offs))}"
    if any(None in by_text.values() for by_text in factors.values()):
        raise Failed(
            f"{uncounted}2x4 or 8x1 is off by {max(offs):.2g} of the largest gradient of 1x8, by no factor per text"
        )
    equal, unequal = ([_span(list(factors[design, name].values())) for name in SPLITS] for design in designs)
    divisors = [name for name, divisor in DIVISORS.items() if _divided(loss, designs, factors, divisor)]
    why = f": it divides by the {divisors[0]} of each micro-batch" if divisors else ""
    if not loss.counted and equal == unequal == ["2", "8"]:
        raise Remark(
            f"{uncounted}2x4 gives 2 and 8x1 8 times the gradient of 1x8{why}; right where the caller divides by the "
            "number of micro-batches"
        )
    raise Failed(
        f"{uncounted}2x4 gives {equal[0]} and 8x1 {equal[1]} times the gradient of 1x8 "
        f"(unequal texts: {unequal[0]} and {unequal[1]} times){why}"
    )


@rule(
    "evaluation losses of different batches cannot be averaged, nor compared with the training loss",
    raising="evaluation, which gives no count, stops",
    laid_out=True,
)
def evaluation(loss: Specimen) -> str:
    """Without a count the loss is the mean over predicted tokens."""
    texts = loss.unequal()
    n = count(texts)
    alone = loss.read_batch(texts, None)
    if alone.shape:
        raise Failed(f"returns shape {alone.shape}: a trainer's backward needs one number")
    if not bool(alone.value.isfinite()):
        raise Failed(f"without {COUNT} the loss is {float(alone.value)}")
    if loss.counted:
        with_count = loss.read_batch(texts, n)
        same(loss, alone, with_count, f"without {COUNT}, against a call with {n}")
        if relative(alone.value, with_count.value) > loss.tolerance:
            raise Failed(f"the loss is {alone.value:.6g} without {COUNT}, {with_count.value:.6g} with {n}")
    counted = f", as with the count {n}" if loss.counted else ""
    if loss.scope in ("batch", "pair") or loss.declared == "sequence":
        return f"{alone.value:.4g}, finite (scope {loss.scope}: its mean over tokens is not required)"
    mean = sum(count([text]) * loss.read_batch([text], None).value for text in texts) / n
    if relative(alone.value, mean) <= loss.tolerance:
        return f"without {COUNT} the mean over predicted tokens{counted}"
    if (weights := _weights(loss, [texts[0], texts[4], texts[5]])) is not None:
        lengths = ", ".join(str(count([texts[i]])) for i in (0, 4, 5))
        if max(abs(w - 1) for w in weights) <= PER_TEXT:
            raise Remark(f"the mean over texts of {_of_a_text(loss, texts[0])}, not the mean over tokens{counted}")
        shares = " : ".join(f"{w:.3g}" for w in weights)
        raise Remark(
            f"a weighted mean: texts of {lengths} labels count {shares}{counted}; averaging batches needs these"
        )
    times = float(loss.read_batch([*texts, *texts], None).value / alone.value)
    kind = "a sum, no mean" if abs(times - 2) <= loss.tolerance else "no mean over predicted tokens"
    raise Failed(
        f"{kind}: the batch gives {alone.value:.6g}, its texts alone a token mean of {mean:.6g}; "
        f"every text twice gives {times:.4g} times the loss"
    )


def _weights(loss: Specimen, three: Sequence[Text]) -> tuple[float, float, float] | None:
    """The weights of three texts, if the loss of any of them together is the weighted mean of their losses alone."""

    def value(*which: int) -> float:
        return float(loss.read_batch([three[i] for i in which], None).value)

    def odds(i: int, j: int) -> float:
        gap = value(i, j) - value(i)
        return (value(j) - value(i, j)) / gap if gap else float("nan")

    first, second, both = odds(0, 1), odds(1, 2), odds(0, 2)
    consistent = min(first, second, both) > 0 and abs(first * second / both - 1) <= PER_TEXT
    return (1.0, 1 / first, 1 / both) if consistent else None


def _of_a_text(loss: Specimen, text: Text) -> str:
    """The loss of one text in words, from its value for the same labels once and twice in the text."""
    n = count([text])
    rows = torch.arange(n)
    once, twice = (
        float(loss.read_batch(cut(text.tokens[which], len(which)), None).value) for which in (rows, rows.repeat(2))
    )
    ratio = twice / once if once else float("nan")
    for exponent, what in POWERS.items():
        if abs(ratio / 2**exponent - 1) <= PER_TEXT:
            return what
    return f"each text's loss, which grows {ratio:.3g} times as its labels are shown twice"


def _accumulated(loss: Specimen, texts: list[Text], size: int) -> list[Tensor]:
    """The gradient of every text, in micro-batches of ``size`` texts called with the count of the whole batch."""
    n = count(texts)
    parts = [loss.read_batch(texts[i : i + size], n).grad for i in range(0, len(texts), size)]
    return list(torch.cat(parts).split([len(text.labels) for text in texts]))


def _factors(loss: Specimen, actual: list[Tensor], expected: list[Tensor]) -> dict[int, float | None]:
    """The factor of every text that has a gradient, by its number; None where the gradient is no multiple."""
    pairs = enumerate(zip(actual, expected, strict=True))
    return {i: factor(loss, *pair) for i, pair in pairs if bool(pair[0].any()) or bool(pair[1].any())}


def _divided(loss: Specimen, designs: dict, factors: dict, divisor: Callable[[list[Text]], int]) -> bool:
    """Whether every factor is the count of the whole batch over that of the text's own micro-batch."""
    for (design, name), by_text in factors.items():
        texts, size = designs[design], SPLITS[name]
        for i, actual in by_text.items():
            expected = divisor(texts) / divisor(texts[i - i % size :][:size])
            if abs(actual / expected - 1) > max(loss.tolerance, 1e-3):
                return False
    return True


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}"


def _remark(loss: Specimen) -> str:
    """A remark for callers that accumulate a loss which returns one number for its rows."""
    if loss.read(loss.tokens()).shape:
        return ""
    try:
        reduction = find_reduction(loss.fn, loss.params, loss.tokens(), loss.variant.spec)
    except InputError as error:
        return f" (remark: {error})"
    return (
        ""
        if reduction == "sum"
        else " (remark: it returns the mean over its rows, which the caller must undo to accumulate)"
    )
