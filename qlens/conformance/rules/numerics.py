"""Rules on precision, extreme logits and stop-gradients."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from qlens.conformance.harness import COARSE_TOLERANCE, PER_TEXT, Specimen
from qlens.conformance.rules.rule import Failed, NotApplicable, Remark, relative, rule, to
from qlens.conformance.synthetic_batches import Text, cast, count, cut, everywhere
from qlens.core.autograd import gradient, slopes
from qlens.core.errors import InputError
from qlens.core.probes import probes
from qlens.core.probes.trial_tokens import random_tokens
from qlens.core.scales import COARSE, PRECISION, carried
from qlens.core.tokens import Tokens

RARE = (0.5, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # p_y of a few rows
GAP = 1e4  # between the label's logit and the rest: p_y is 0 or 1 in every precision
NARROW = (20.0, 30.0, 40.0)  # gaps at which a gradient that grows exponentially is still finite, in float32 too
EXPONENTIAL = 0.5  # growth per nat
STEP = 1e-3  # of a numerical derivative: float32 inside still leaves three digits


@rule("gradients in float32 are wrong by far more than rounding")
def float32(loss: Specimen) -> str:
    """The gradient in float32 is near that in float64."""
    if loss.dtype != torch.float64:
        raise NotApplicable("it refuses float64; all else here is read in float32")
    off, tolerance, remark = _rounding(loss, torch.float32, max(PRECISION[torch.float32], loss.tolerance))
    if off > tolerance:
        raise Failed(f"off by {off:.2g} of the largest gradient in float64, where {tolerance:g} is rounding")
    if loss.digits in COARSE:
        near = (
            f"within {off:.0e} of the largest gradient in float64"
            if off
            else "the same gradient in float32 and float64"
        )
        raise Remark(f"it computes in {_named(loss.digits)}, whatever it is given: {near}{remark}")
    return (f"within {off:.0e} of the largest gradient in float64" if off else "as in float64") + remark


@rule("training in bfloat16 follows another gradient than the loss's own")
def bfloat16(loss: Specimen) -> str:
    """The gradient in bfloat16 is finite and near that in float64."""
    off, tolerance, remark = _rounding(loss, torch.bfloat16, COARSE_TOLERANCE)
    against = str(loss.dtype).removeprefix("torch.")
    if off > tolerance:
        raise Failed(f"off by {off:.2g} of the largest gradient in {against}, where {tolerance:g} is rounding")
    near = f"within {off:.0e} of the largest gradient in {against} (allowed: {tolerance:g})"
    return f"finite, {near if off else f'the same as in {against}'}{remark}"


@rule("a masked or padded vocabulary turns the loss NaN", compares=False)
def impossible(loss: Specimen) -> str:
    """Impossible tokens, with logits of -1e30 or -inf, leave the gradient finite."""
    tokens, half = loss.tokens(), loss.vocabulary // 2
    tokens = tokens.replace(labels=tokens.labels % half)  # labels come from the first half: no label is impossible
    columns, some = torch.zeros(2, *tokens.logits.shape, dtype=torch.bool)
    columns[:, -2:] = True
    some[torch.arange(len(tokens)), half + torch.arange(len(tokens)) % (loss.vocabulary - half)] = True
    finite = "padded columns at -1e30"
    pulled = _pull(loss, _impossible(loss, tokens, columns, -1e30, finite), columns, finite)
    if loss.dtype != torch.float32:
        _impossible(loss, cast(tokens, torch.float32), columns, -1e30, f"{finite} in float32")
    notes = [pulled] if pulled else []
    cases = {"padded columns at -inf": columns, "some logits -inf": some}
    if loss.kind in ("hidden", "model"):  # no product with a head is -inf
        cases = {}
    for case, where in cases.items():
        try:
            grad = _impossible(loss, tokens, where, -torch.inf, case)
        except Failed as failure:
            notes.append(f"{failure}; finite at -1e30, as models mask tokens")
            break
        except InputError as error:
            notes.append(f"{case}: {error}")
            break
        if not pulled and (note := _pull(loss, grad, where, case)):
            notes.append(note)
    if notes:
        raise Remark("; ".join(notes))
    return f"finite, no gradient there: {', '.join([finite, *cases])}"


def _impossible(loss: Specimen, tokens: Tokens, where: Tensor, value: float, case: str) -> Tensor:
    masked = everywhere(tokens, where, value)
    if masked.negatives is not None:
        masked = masked.replace(negatives=masked.negatives & ~where)
    reading = loss.read(masked)
    _finite(reading.grad, case)
    if not bool(reading.value.isfinite()):
        raise Failed(f"{case}: the loss is {float(reading.value)}, its gradient finite")
    return reading.grad


def _pull(loss: Specimen, grad: Tensor, where: Tensor, case: str) -> str:
    """A remark on a gradient at tokens that cannot occur, or nothing."""
    pulls = grad[where]
    share = float(pulls.abs().max() / grad.abs().max()) if bool(pulls.any()) else 0.0
    if share <= loss.nothing:
        return ""
    way = "up" if bool((pulls <= 0).all()) else "down" if bool((pulls >= 0).all()) else "up and down"
    return (
        f"{case} are pulled {way} by up to {share:.2g} of the largest gradient: what the method asks for (smoothing, a "
        "teacher or a penalty gives every column a share), no fault of the code; cut padded columns off before the loss"
    )


@rule("one sure or hopeless token turns the weights NaN", compares=False)
def extremes(loss: Specimen) -> str:
    """The gradient is finite at p_y near 0 and 1."""
    notes = []
    for sign, case in ((-1, "p_y near 0"), (1, "p_y = 1")):
        for dtype in dict.fromkeys((loss.dtype, torch.float32)):
            try:
                _finite(_with_gap(loss, sign * GAP, dtype), f"{case} in {_named(dtype)}")
            except Failed as failure:
                if not (reason := _growth(loss, sign) or _sparsely(loss, sign, dtype)):
                    raise
                notes += [f"{failure}; {reason}"] if not notes else []
    if notes:
        raise Remark("; ".join(notes))
    rows = len(RARE)
    for dtype in dict.fromkeys((loss.dtype, torch.float32)):  # few rows: a mean over many hides what overflows
        _finite(_rare(loss, dtype), f"p_y from {RARE[0]:g} to {RARE[-1]:g} on {rows} tokens in {_named(dtype)}")
    return f"finite gradient at p_y near 0 and p_y = 1 (logits {GAP:g} apart)"


def _with_gap(loss: Specimen, gap: float, dtype: torch.dtype, every: int = 1) -> Tensor:
    """The gradient where every label's logit, or every third one's, say, is this far above the highest of the rest."""
    tokens = loss.tokens()
    label = tokens.labels[:, None]
    top = tokens.logits.scatter(1, label, -torch.inf).amax(-1, keepdim=True) + gap
    rows = (torch.arange(len(tokens)) % every == 0)[:, None]
    logits = torch.where(rows, tokens.logits.scatter(1, label, top), tokens.logits)
    return loss.read(cast(tokens.replace(logits=logits), dtype)).grad


def _rare(loss: Specimen, dtype: torch.dtype) -> Tensor:
    """The gradient of a few rows whose labels have the probabilities RARE."""
    tokens = loss.tokens(len(RARE))
    label = tokens.labels[:, None]
    rest = tokens.logits.double().scatter(1, label, -torch.inf).logsumexp(-1, keepdim=True)
    odds = torch.tensor(RARE, dtype=torch.float64).logit()[:, None]
    return loss.read(
        cast(tokens.with_logits(tokens.logits.scatter(1, label, (rest + odds).to(tokens.logits))), dtype)
    ).grad


def _sparsely(loss: Specimen, sign: int, dtype: torch.dtype) -> str:
    """A remark if the gradient is finite where only some tokens are extreme; else ""."""
    if not bool(_with_gap(loss, sign * GAP, dtype, every=3).isfinite().all()):
        return ""
    return "so only where all tokens of a batch are: finite where a third of them is, as in a division by their mean weight"


def _growth(loss: Specimen, sign: int) -> str:
    """A remark if the gradient grows exponentially with the gap, so that it overflows in any code; else ""."""
    sizes = [float(_with_gap(loss, sign * gap, loss.dtype).abs().max()) for gap in NARROW]
    rates = [
        math.log(more / less) if 0 < less < math.inf and 0 < more < math.inf else 0.0 for less, more in pairwise(sizes)
    ]
    if min(rates) < EXPONENTIAL * (NARROW[1] - NARROW[0]):
        return ""
    size_by_gap = ", ".join(f"{size:.2g} at {gap:g}" for size, gap in zip(sizes, NARROW, strict=True))
    return (
        f"the gradient itself grows exponentially with the gap between the logits ({size_by_gap}), whatever the code: "
        "bound the log-ratio or the weight that does so"
    )


@rule("the printed loss and the declared target train differently")
def stop_gradient(loss: Specimen) -> str:
    """The factors that are detached are those that the method declares."""
    variant = loss.variant
    if variant.method.printed is None:
        raise NotApplicable(f"no target is declared; found: {_stop_gradient(loss)}")
    offs = []
    for tokens in (random_tokens(64, loss.vocabulary), probes()):
        declared = variant.target(tokens)
        offs.append(relative(gradient(variant.loss, tokens), declared.scale[:, None] * (tokens.probs - declared.q)))
    if max(offs) > PRECISION[torch.float64]:
        raise Failed(f"the loss's gradient is off scale (p - Q) by {max(offs):.2g} of its largest entry")
    return f"the gradient of the printed loss is scale (p - Q) {to(max(offs))}"


def _rounding(loss: Specimen, dtype: torch.dtype, tolerance: float) -> tuple[float, float, str]:
    """How far the gradient in a narrower type is from that of the same, rounded logits, and how far it may be.

    It may be as far as the gradient moves when the logits move by one rounding: a loss that selects tokens by a threshold
    or a rank takes another selection then, in any precision.

    Raises:
        Failed: it is not finite.
    """
    narrow = cast(loss.tokens(), dtype)
    try:
        grad = loss.read(narrow).grad
    except InputError as error:
        if isinstance(error.__cause__, NotImplementedError):
            raise Remark(f"{error} (on this device)") from error
        raise
    _finite(grad, "ordinary logits")
    if carried(grad) in COARSE:  # it computes in less, under autocast say
        tolerance = max(tolerance, COARSE_TOLERANCE)
    wide = cast(narrow, loss.dtype)
    exact = loss.read(wide).grad
    off = relative(grad, exact)
    if off <= tolerance:
        return off, tolerance, ""
    draw = torch.Generator().manual_seed(13)
    changes = []
    for _ in range(4):
        noise = torch.randn(wide.logits.shape, generator=draw, dtype=torch.float64).to(wide.logits)
        step = torch.finfo(dtype).eps * wide.logits.abs().amax(-1, keepdim=True)
        changes.append(relative(loss.read(wide.replace(logits=wide.logits + noise * step)).grad, exact))
    own = max(changes)
    if own <= tolerance:
        return off, tolerance, ""
    remark = f"; one rounding of the logits moves it by {own:.2g} in any precision, as where tokens are selected"
    return off, max(tolerance, own), remark


def _finite(grad: Tensor, case: str) -> None:
    broken = ~grad.isfinite().all(-1)
    if bool(broken.any()):
        raise Failed(f"{case}: the gradient is NaN or infinite on {int(broken.sum())} of {len(grad)} tokens")


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _positions(texts: Sequence[Text]) -> Tokens:
    """The logits and labels of every position of texts, as tokens."""
    labels = torch.cat([text.labels for text in texts]).clamp(min=0)
    return Tokens(torch.cat([text.logits for text in texts]).detach(), labels)


def _stop_gradient(loss: Specimen) -> str:
    """Whether the gradient is the derivative of the printed value, along a few random directions."""
    if loss.tolerance == COARSE_TOLERANCE:
        return f"it computes in {_named(loss.digits)}, too coarse for a numerical derivative"
    tokens = loss.tokens()
    if loss.laid_out:  # positions that predict no label may have a gradient too, and move with the others
        texts = cut(tokens, PER_TEXT)
        tokens, grad = _positions(texts), loss.read_batch(texts, len(tokens)).grad

        def value(tokens: Tokens) -> Tensor:
            parts = tokens.logits.split([len(text.logits) for text in texts])
            moved = [text._replace(logits=part) for text, part in zip(texts, parts, strict=True)]
            return loss.read_batch(moved, count(texts)).value
    else:
        value, grad = loss.value, loss.read(tokens).grad
    slope_pairs = slopes(value, grad, tokens, STEP, seed=0)
    worst = max(abs(slope - numerical) for slope, numerical in slope_pairs) / float(grad.norm())
    if worst <= 0.01:
        return f"the gradient is the derivative of the printed value to {worst:.0e}: no factor is detached"
    return f"the gradient is not the derivative of the printed value (off by {worst:.2g}): a factor is detached"
