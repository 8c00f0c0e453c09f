"""Rules for any loss: which label a row learns, precision, limits, stop-gradients, and manners."""

from collections.abc import Callable

import torch
from torch import Tensor

from qlens.conformance.rules import REACTING, Failed, NotApplicable, reactions, relative, rule, same, to
from qlens.conformance.specimen import COARSE_TOLERANCE, TOLERANCE, Reading, Specimen
from qlens.conformance.texts import VOCABULARY, cast, everywhere
from qlens.conformance.wrapping import changing, watching
from qlens.lens import gradient, slopes
from qlens.probes import probes
from qlens.testing import PRECISION, random_tokens
from qlens.tokens import Tokens

SHIFTS = {
    True: {0: "it does not shift", 2: "shifted twice", -1: "shifted backwards"},
    False: {1: "it shifts labels that are already aligned", -1: "shifted backwards"},
}
LABELS = VOCABULARY // 2  # where some tokens are impossible, labels come from the first half, so that they never are
GAP = 1e4  # between the label's logit and the rest: p_y is 0 or 1 in every precision
STEP = 1e-3  # of a numerical derivative: float32 inside still leaves three digits


@rule("the model is trained to say another token than the one that comes next")
def shift(loss: Specimen) -> str:
    """Which label a row's gradient reacts to."""
    found = reactions(loss)
    if not found:
        raise NotApplicable("no gradient's direction depends on which token a label is")
    if loss.laid_out and any(label // REACTING != row // REACTING for label, row in found):
        raise Failed("a text's last row learns the first label of the next text: it shifts across the batch")
    wanted, offsets = int(loss.laid_out), sorted({label - row for label, row in found})
    if offsets != [wanted]:
        said = " and ".join(f"row t learns {_label(offset)}" for offset in offsets)
        name = SHIFTS[loss.laid_out].get(offsets[0]) if len(offsets) == 1 else None
        raise Failed(said + (f": {name}" if name else ""))
    return f"row t learns {_label(wanted)}: {len(found)} labels changed one at a time"


@rule("gradients in float32 are wrong by far more than rounding")
def float32(loss: Specimen) -> str:
    """Against float64."""
    if loss.dtype != torch.float64:
        raise NotApplicable("it refuses float64; all else here is read in float32")
    off = _rounding(loss, torch.float32)
    tolerance = max(PRECISION[torch.float32], loss.tolerance)
    if off > tolerance:
        raise Failed(f"off by {off:.2g} of the largest gradient in float64, where {tolerance:g} is rounding")
    return f"within {off:.0e} of the largest gradient in float64" if off else "as in float64: it computes in float32"


@rule("training in bfloat16 follows another gradient than the loss's own")
def bfloat16(loss: Specimen) -> str:
    """Finite, and near float64."""
    off = _rounding(loss, torch.bfloat16)
    against = str(loss.dtype).removeprefix("torch.")
    if off > COARSE_TOLERANCE:
        raise Failed(f"off by {off:.2g} of the largest gradient in {against}, where {COARSE_TOLERANCE:g} is rounding")
    return f"finite, within {off:.0e} of the largest gradient in {against} (allowed: {COARSE_TOLERANCE:g})"


@rule("a masked or padded vocabulary turns the loss NaN, or is trained on", compares=False)
def impossible(loss: Specimen) -> str:
    """Tokens that cannot occur."""
    tokens = loss.tokens()
    tokens = tokens.replace(labels=tokens.labels % LABELS)
    columns, some = torch.zeros(2, *tokens.logits.shape, dtype=torch.bool)
    columns[:, -2:] = True
    some[torch.arange(len(tokens)), LABELS + torch.arange(len(tokens)) % (VOCABULARY - LABELS)] = True
    cases = {"padded columns at -1e30": (columns, -1e30)}
    if loss.kind not in ("hidden", "model"):  # no product with a head is -inf
        cases |= {"padded columns at -inf": (columns, -torch.inf), "some logits -inf": (some, -torch.inf)}
    for case, (where, value) in cases.items():
        shown = everywhere(tokens, where, value)
        if shown.negatives is not None:
            shown = shown.replace(negatives=shown.negatives & ~where)
        _finite(loss, shown, case)
        made = loss.read(shown)
        if not bool(made.value.isfinite()):
            raise Failed(f"{case}: the loss is {float(made.value)}, its gradient finite")
        pulled = float(made.grad[where].abs().max() / made.grad.abs().max())
        if pulled > 1e-12:
            raise Failed(f"{case}: they are pulled by up to {pulled:.2g} of the largest gradient")
    return f"finite, no gradient there: {', '.join(cases)}"


@rule("one sure or hopeless token turns the weights NaN", compares=False)
def extremes(loss: Specimen) -> str:
    """p_y at 0 and at 1."""
    for sign, case in ((-1, "p_y near 0"), (1, "p_y = 1")):
        for dtype in dict.fromkeys((loss.dtype, torch.float32)):
            tokens = loss.tokens()
            label = tokens.labels[:, None]
            top = tokens.logits.amax(-1, keepdim=True) + sign * GAP
            shown = cast(tokens.replace(logits=tokens.logits.scatter(1, label, top)), dtype)
            _finite(loss, shown, f"{case} in {str(dtype).removeprefix('torch.')}")
    return f"finite gradient at p_y near 0 and p_y = 1 (logits {GAP:g} apart)"


@rule("the printed loss and the declared target train differently")
def stop_gradient(loss: Specimen) -> str:
    """What is held constant is what the method declares."""
    variant = loss.variant
    if variant.method.printed is None:
        raise NotApplicable(f"no target is declared; found: {_held(loss)}")
    offs = []
    for tokens in (random_tokens(64, 24), probes()):
        declared = variant.target(tokens)
        offs.append(relative(gradient(variant.loss, tokens), declared.scale[:, None] * (tokens.probs - declared.q)))
    if max(offs) > PRECISION[torch.float64]:
        raise Failed(f"the loss's gradient is off scale (p - Q) by {max(offs):.2g} of its largest entry")
    return f"the gradient of the printed loss is scale (p - Q) {to(max(offs))}"


@rule("it fails, or trains on wrong numbers, after a transpose or a slice")
def contiguous(loss: Specimen) -> str:
    """Strided input."""
    texts = loss.texts((5, 5)) if loss.laid_out else []  # the strides of a single text hide from view()

    def read(change: Callable[[Tensor], Tensor]) -> Reading:
        return (
            loss.read_batch(texts, 10, around=changing(change)) if texts else loss.read(loss.tokens(), changing(change))
        )

    off = same(loss, read(_strided), read(Tensor.contiguous), "non-contiguous logits and labels")
    return f"non-contiguous logits and labels give the same gradient {to(off)}"


@rule("runs cannot be repeated, nor losses compared: seed it, or switch dropout off", compares=False)
def deterministic(loss: Specimen) -> str:
    """Two calls."""
    first, second = (loss.read(loss.tokens()) for _ in range(2))
    off = max(relative(second.grad, first.grad), relative(second.value, first.value))
    if off > TOLERANCE:
        raise Failed(f"two calls on the same input differ by {off:.2g} of the largest gradient")
    return f"two calls agree {to(off)}"


@rule("metrics, or a second loss on the same logits, see what it left there", compares=False)
def inputs(loss: Specimen) -> str:
    """Nothing is written on."""
    written: list[str] = []
    loss.read(loss.tokens(), watching(written))
    if written:
        raise Failed(f"it writes in place on {', '.join(dict.fromkeys(written))}")
    return "all it is given stays as it was"


def _label(offset: int) -> str:
    return f"label t{offset:+d}" if offset else "its own label"


def _rounding(loss: Specimen, dtype: torch.dtype) -> float:
    """How far the gradient in a narrower type is from that of the same, rounded logits.

    Raises:
        Failed: it is not finite.
    """
    narrow = cast(loss.tokens(), dtype)
    _finite(loss, narrow, "ordinary logits")
    return relative(loss.read(narrow).grad, loss.read(cast(narrow, loss.dtype)).grad)


def _finite(loss: Specimen, tokens: Tokens, case: str) -> None:
    broken = ~loss.read(tokens).grad.isfinite().all(-1)
    if bool(broken.any()):
        raise Failed(f"{case}: the gradient is NaN or infinite on {int(broken.sum())} of {len(tokens)} tokens")


def _held(loss: Specimen) -> str:
    """Whether the gradient is the derivative of the printed value, along a few random directions."""
    if loss.tolerance == COARSE_TOLERANCE:
        return "it computes in bfloat16, too coarse for a numerical derivative"
    tokens = loss.tokens()
    grad = loss.read(tokens).grad
    found = slopes(loss.value, grad, tokens, STEP, seed=0)
    worst = max(abs(slope - taken) for slope, taken in found) / float(grad.norm())
    if worst <= 0.01:
        return f"the gradient is the derivative of the printed value to {worst:.0e}: nothing is held constant"
    return f"the gradient is not the derivative of the printed value (off by {worst:.2g}): part of it is held constant"


def _strided(value: Tensor) -> Tensor:
    """The same values, laid out with gaps between them, the vocabulary not innermost."""
    if not value.ndim:
        return value
    spread = torch.stack([value, value], -1)[..., 0]
    return spread if value.ndim < 2 else value.transpose(-1, -2).contiguous().transpose(-1, -2)
