"""Findings: the lines of detail of an explanation, warnings first."""

from typing import Any

import torch

from qlens.core.numerics import dtype_name, expectation
from qlens.core.scales import COARSE
from qlens.lens.describe.coefficients import (
    ALIKE,
    TRUST,
    all_equal,
    batch_prefix,
    coefficient,
    coverage,
    extra_factor,
    known_label_weight,
    p_y_range,
    pushed_down,
    remaining_zero,
    resolution,
    rounded,
    without_gradient,
)
from qlens.lens.weights.features import percent

DECOMPOSITION = "Decomposition g = sum_j w_j (p - R_j)"
WEIGHT = "  R = "  # how the parts of the decomposition begin


def lines(e: Any) -> list[str]:
    """The findings of an explanation, a line each, warnings first."""
    non_finite = int((~e.figures["grad_norm"].isfinite()).sum())
    if non_finite:
        return [f"WARNING: the gradient is not finite on {non_finite} of {len(e.table)} tokens."]
    if e.zero_gradient:
        up_to = "" if not bool(e.figures["grad_norm"].any()) else " up to rounding"
        return [f"WARNING: the gradient is zero on every token{up_to}: Q = p, nothing is learned."]
    text = [*_reading(e)]
    if e.label_offset:
        text.append(f"WARNING: {wrong_shift(e)}.")
    text += [
        f"WARNING: {name} has no effect: the loss takes it and neither its value nor its gradient changes."
        for name in e.unused_inputs
    ]
    text += [f"No softmax: {e.shift_variance.uncoupled}."] if uncoupled(e) else [*_coefficient(e), *_residual(e)]
    if pair_sides(e):
        text.append(f"{'WARNING: p' if 'REJECTED' in pair_sides(e) else 'P'}airs: {pair_sides(e)}.")
    failed = (
        e.class_weights_error
        and f"not tested: with one token given many label ids the loss raises {e.class_weights_error}"
    )
    parts = (
        ("Near match", e.near_match),
        ("Two terms", e.two_terms),
        ("Batch", e.batch_factor),
        ("Class weights", e.class_weights or failed or None),
        ("Batch", e.batch_moments),
        ("Batch gate", e.batch_gate),
        ("Position weights", e.position_weights),
    )
    text += [f"{name}: {part}." for name, part in parts if part is not None]
    if e.piecewise_linear and not uncoupled(e):
        text.append(
            "No softmax: small changes of the logits leave the gradient as it is; the loss is a margin of raw logits."
        )
    text += [*([] if uncoupled(e) else _decomposition(e)), *_simplex(e)]
    if e.scope is not None:
        text.append(f"Scope: {e.scope}")
    text += _coverage(e)
    if e.non_finite_trials:
        text.append(f"WARNING: the gradient is not finite on {e.non_finite_trials} further trial tokens.")
    return text + ([f"Other vocabularies: {e.other_vocabularies}"] if e.other_vocabularies else []) + _range_covered(e)


def _coverage(e: Any) -> list[str]:
    """What of a long text was analysed, and where its thresholds act."""
    coverage = e.coverage
    if coverage is None:
        return []
    text, off = [str(coverage)], len(coverage.exceptions)
    if off:
        where = p_y_range(e.table["p_y"][coverage.exceptions.numpy()], ".3g")
        text.append(f"WARNING: on {off} of these {coverage.tokens} tokens ({where}) the gradient is another one.")
    for name, number in coverage.excluded.items():
        law = e.laws[name]
        acts = (
            f"excludes {number} of {coverage.tokens} tokens"
            if law.where
            else f"acts on {number} of {coverage.tokens} tokens"
        )
        never = "excludes no token" if law.where else "acts on no token"
        text.append(
            f"On your text the {'threshold' if law.where else 'clip'} of {law.formula} {acts if number else never}."
        )
    return text


def _reading(e: Any) -> list[str]:
    """Remarks on how the loss was read: its reduction, its precision, its values and what it writes on."""
    text = []
    if e.whole_batch:
        text.append(
            "WARNING: read as a whole batch, its reduction left as it is; the findings hold for the batches tried. "
            f"{e.whole_batch}"
        )
    if e.own_precision is not None and e.own_precision.dtype in COARSE:
        text.append(
            "Precision: read with the loss's casts replaced by float64; "
            f"{dtype_name(e.own_precision.dtype)} changes the gradient "
            f"by {percent(e.own_precision.usual)} at the median token, by up to {percent(e.own_precision.largest)}."
        )
    elif e.precision in COARSE:
        text.append(f"Precision: the gradient has the digits of {dtype_name(e.precision)} only.")
    undefined = int((~e.losses.isfinite()).sum())
    if undefined:
        text.append(f"WARNING: the loss is not finite on {undefined} of {len(e.table)} tokens.")
    return text + [f"WARNING: the loss modifies its argument {name} in place." for name in e.modified_inputs]


def _range_covered(e: Any) -> list[str]:
    """The range of the trial tokens, beyond which nothing is known."""
    if e.trial_tokens is None:
        return []
    p, log_p, size = e.trial_tokens.label_probs, e.trial_tokens.log_probs, e.trial_tokens.logits.shape[1]
    entropy = -float(expectation(log_p.exp(), log_p).min())
    z = e.trial_tokens.logits[e.trial_tokens.logits.isfinite()]
    return [
        f"Range covered: p_y down to {float(p.min()):.0e}, entropy up to {entropy:.3g} nats, logits {float(z.min()):.0f} to "
        f"{float(z.max()):.0f}, label ids and ranks up to {size - 1}; clamps and thresholds outside it go unnoticed."
    ]


def negative_floor(e: Any) -> float:
    """Negative mass up to which it is rounding."""
    return max(1e-9, 20 * torch.finfo(e.precision).eps)


def _decomposition(e: Any) -> list[str]:
    """The decomposition of the gradient, a line per part, or how much of it the best one leaves."""
    mixture = e.mixture
    if mixture is None:
        return []
    if not mixture.explains:
        signed = percent(max(mixture.misfit, mixture.held))
        return [
            f"{DECOMPOSITION}: none fits; the best with weights of at least 0 on all known distributions leaves "
            f"{percent(mixture.closest)} of the gradient, the best with weights of either sign on {len(mixture.parts)} of them "
            f"leaves {signed}."
        ]
    fit, held_out = _relative_error(mixture.misfit), _relative_error(mixture.held)
    signed = ", some w negative" if mixture.signed else ""
    text = [f"{DECOMPOSITION}, relative error {fit} (held out: {held_out}){signed}:"]
    for name, weight in mixture.parts.items():
        known, law = weight[mixture.sure], e.laws.get(name)
        span = f"{float(known.min()):.4g} to {float(known.max()):.4g}, no known formula" if len(known) else "not known"
        text.append(f"{WEIGHT}{name}: w = {law.formula if law else span}")
    if domain := next((law.domain for law in e.laws.values() if law), ""):
        text.append(f"  (weights fitted {domain})")
    if not bool(mixture.unique.all()):
        text.append(f"  (not identifiable on {int((~mixture.unique).sum())} of {len(mixture.unique)} tokens)")
    return text + [f"  ({other} and {name} are equal on these tokens)" for name, other in mixture.alike]


def _coefficient(e: Any) -> list[str]:
    """The label's coefficient, and the tokens whose label is pushed down."""
    weight, p_y, n = known_label_weight(e), e.table["p_y"], len(e.table)
    if weight.empty:
        return ["Every p_y is 1 here: no label can gain probability."]
    (name, values), zero = coefficient(e), without_gradient(e)
    text = []
    if values.empty:
        text.append(f"{name}: not distinguishable from rounding here.")
    elif all_equal(values, e):
        text.append(f"{name}: {batch_prefix(e)}{rounded(values.median(), e)} on {coverage(e, values)}.")
    else:
        ends = [f"{rounded(values[row], e)} (p_y = {p_y[row]:.6g})" for row in (values.idxmin(), values.idxmax())]
        others = f"; {remaining_zero(len(zero))}" if len(zero) else ""
        text.append(f"{name}: {batch_prefix(e)}{' to '.join(ends)}{extra_factor(e)}{others}.")
    down = pushed_down(e)
    if len(down):
        at, count = p_y[down], f"{len(down)} of {n} tokens"
        # a Q_y below p_y may be intended, one below 0 hardly
        alarm = "WARNING: the" if (e.table["q_label"][down] < -negative_floor(e)).any() else "The"
        outweighed = name == TRUST and not values.empty and values.min() >= 0
        reason = ", where the other parts of the gradient outweigh the label's" if outweighed else ""
        text.append(f"{alarm} label is pushed DOWN on {count} ({p_y_range(at, '.6g')}){reason}.")
    return text


def uncoupled(e: Any) -> bool:
    """Whether the loss has no softmax and is no known method: then neither label weight nor decomposition means anything."""
    variance = e.shift_variance
    return variance is not None and bool(variance.uncoupled) and not (e.registered or (e.nearest and e.nearest[0].same))


def wrong_shift(e: Any) -> str:
    """A sentence on labels that are shifted wrongly; "" where they are not."""
    if not e.label_offset:
        return ""
    side = "after" if e.label_offset > 0 else "before"
    places = f"{abs(e.label_offset)} place{'s' if abs(e.label_offset) > 1 else ''} {side}"
    return f"each position is trained on the label {places} the one that it should predict: labels are shifted wrongly"


def pair_sides(e: Any) -> str:
    """Which side of a pair a loss of pairs raises and which it lowers; "" where that differs between tokens."""
    chosen = e.tokens.chosen
    if e.scope is None or e.scope.of != "pair" or chosen is None:
        return ""
    weight = known_label_weight(e)
    known = weight[weight.abs() > resolution(e)]
    of_chosen = chosen.cpu().numpy()[known.index]
    sides = known[of_chosen], known[~of_chosen]
    if any(side.empty for side in sides):
        return ""
    if (sides[0] > 0).all() and (sides[1] < 0).all():
        return "it raises the chosen sequences and lowers the rejected ones"
    if (sides[0] < 0).all() and (sides[1] > 0).all():
        return "it raises the REJECTED sequences and lowers the chosen ones: the two are swapped or the sign is wrong"
    return ""


def _residual(e: Any) -> list[str]:
    table, largest = e.table, e.table["reshape"].max()
    if largest < max(ALIKE, 2 * torch.finfo(e.precision).eps):
        return ["Residual: the student's own distribution; the ratios among the other tokens stay as they are."]
    at = table.loc[table["reshape"].idxmax(), "p_y"]
    return [f"Reshaping: Q moves up to {largest:.3g} of the probability among the other tokens (at p_y = {at:.3g})."]


def _simplex(e: Any) -> list[str]:
    """Whether Q is a distribution, and why its sum is not 1."""
    table, text = e.table, []
    n = len(table)
    off = (table["total"] - 1).abs()
    variance = e.shift_variance
    unequal = int((off > 100 * torch.finfo(e.precision).eps).sum()) if variance is not None else 0
    if variance is not None and unequal:
        cause = variance.cause or "the loss sees raw logits, not only their softmax"
        text.append(f"WARNING: sum(Q) is not 1 on {unequal} of {n} tokens (off by up to {off.max():.3g}): {cause}.")
    elif variance is not None:
        text.append(
            f"WARNING: sum(Q) is not 1 on further trial tokens: {variance.cause or 'the loss sees raw logits'}."
        )
    signed = table["negative_mass"] > negative_floor(e)
    if signed.any():
        at = table["p_y"][signed]
        text.append(
            f"Simplex: Q has negative entries on {int(signed.sum())} of {n} tokens ({p_y_range(at, '.3g')}; "
            f"negative mass up to {table['negative_mass'].max():.3g})."
        )
    elif not unequal:
        text.append(f"Simplex: Q is a distribution on all {n} tokens.")
    return text


def _relative_error(error: float) -> str:
    """A relative error in one digit; below 1e-12 it is rounding, which differs between machines."""
    return f"{error:.0e}" if not error < 1e-12 else "< 1e-12"
