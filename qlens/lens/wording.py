"""Words: what was found, a line each, and as a person would say it."""

from typing import Any

import torch

from qlens.core.numerics import expectation
from qlens.core.scales import COARSE
from qlens.lens.weights.features import percent
from qlens.lens.weights.trust import (
    ALIKE,
    alike,
    beside,
    digits,
    net,
    others_zero,
    pushed_down,
    short,
    span,
    told_on,
    trusted,
    untaught,
    where_read,
)


def lines(e: Any) -> list[str]:
    """What a reader should know of an explanation, warnings first."""
    broken = int((~e.target.grad.isfinite().all(-1)).sum())
    if broken:
        return [f"WARNING: the gradient is not finite on {broken} of {len(e.table)} tokens."]
    if e.silent:
        said = "" if not bool(e.target.grad.any()) else " up to rounding"
        return [f"WARNING: the gradient is zero on every token{said}: Q = p, nothing is taught."]
    said = []
    if e.whole:
        said.append(
            f"WARNING: read whole, its division left as it is: what is said holds for the batches shown. {e.whole}"
        )
    if e.own is not None and e.own.dtype in COARSE:
        said.append(
            f"Precision: read with the loss's casts taken to float64; {str(e.own.dtype).removeprefix('torch.')} moves the "
            f"gradient by {percent(e.own.usual)} at the median token, by up to {percent(e.own.largest)}."
        )
    elif e.precision in COARSE:
        said.append(f"Precision: the gradient holds {str(e.precision).removeprefix('torch.')} digits only.")
    undefined = int((~e.losses.isfinite()).sum())
    if undefined:
        said.append(f"WARNING: the loss is not finite on {undefined} of {len(e.table)} tokens.")
    said += [f"WARNING: the loss writes on the {name} it is given." for name in e.written]
    if e.shifted:
        said.append(f"WARNING: {shifted(e)}.")
    said += [
        f"WARNING: {name} has no effect: the loss takes it and neither its value nor its gradient changes."
        for name in e.unused
    ]
    said += [f"No softmax: {e.leak.uncoupled}."] if uncoupled(e) else [*_trust(e), *_rest(e)]
    if sides(e):
        said.append(f"{'WARNING: s' if 'REJECTED' in sides(e) else 'S'}ides: {sides(e)}.")
    untried = f"not tried; on one token given many ids the loss raises {e.ids_untried}" if e.ids_untried else None
    parts = (
        ("Nearly", e.nearly),
        ("Two terms", e.two_terms),
        ("Batch", e.normalised),
        ("Label ids", untried if e.label_weights is None else e.label_weights),
        ("Batch", e.centred),
        ("Gate", e.gate),
        ("Position: a weight by position", e.position_weights),
    )
    said += [f"{name}: {part}." for name, part in parts if part is not None]
    if e.linear and not uncoupled(e):
        said.append(
            "No softmax: its gradient does not change as the logits move a little; it is a margin of raw logits."
        )
    said += [*([] if uncoupled(e) else _mixture(e)), *_simplex(e)]
    if e.scope is not None:
        said.append(f"Scope: {e.scope}")
    if e.broken:
        said.append(f"WARNING: on {e.broken} wider trial tokens the gradient is not finite.")
    return said + ([f"Elsewhere: {e.elsewhere}"] if e.elsewhere else []) + _reached(e)


def _reached(e: Any) -> list[str]:
    """Where the loss was tried, and what lies beyond."""
    if e.tried is None:
        return []
    p, log_p, size = e.tried.label_probs, e.tried.log_probs, e.tried.logits.shape[1]
    entropy = -float(expectation(log_p.exp(), log_p).min())
    z = e.tried.logits[e.tried.logits.isfinite()]
    return [
        f"Tried: p_y down to {float(p.min()):.0e}, entropies up to {entropy:.3g} nats, logits {float(z.min()):.0f} to "
        f"{float(z.max()):.0f}, label ids and ranks up to {size - 1}; "
        "not reached: clamps and thresholds beyond these."
    ]


def floor(e: Any) -> float:
    """Negative mass that is no more than rounding."""
    return max(1e-9, 20 * torch.finfo(e.precision).eps)


def _mixture(e: Any) -> list[str]:
    m = e.mixture
    if m is None:
        return []
    if not m.explains:
        return [
            "Mixture: none explains the gradient; the best non-negative one of all known distributions leaves "
            f"{percent(m.closest)}, the best signed one of {len(m.parts)} leaves {percent(max(m.misfit, m.held))}."
        ]
    said = [
        f"Mixture: {'signed, ' if m.signed else ''}misfit {_rounded(m.misfit)} ({_rounded(m.held)} on the tokens held out)"
    ]
    for name, pull in m.parts.items():
        known = pull[m.sure]
        law = e.laws.get(name)
        span = f"{float(known.min()):.4g} to {float(known.max()):.4g}, by no known law" if len(known) else "not known"
        said.append(f"  pull toward {name}: {law.formula if law else span}")
    if domain := next((law.domain for law in e.laws.values() if law), ""):
        said.append(f"  (laws seen {domain})")
    if not bool(m.unique.all()):
        said.append(f"  ({int((~m.unique).sum())} of {len(m.unique)} tokens cannot tell these apart)")
    said += [f"  ({b} is {a} here)" for a, b in m.alike]
    return said


def _trust(e: Any) -> list[str]:
    """The pull toward the label, from the mixture where that explains the gradient, and what all pulls together do to it."""
    whole, p_y, n = net(e), e.table["p_y"], len(e.table)
    if whole.empty:
        return ["Every p_y is 1 here: nothing is left to trust."]
    trust, zero = trusted(e), untaught(e)
    said = []
    if trust.empty:
        said.append("Trust: how far the label is trusted cannot be told from rounding here.")
    elif alike(trust, e):
        said.append(f"Trust: {where_read(e)}the label is trusted by {short(trust.median(), e)} on {told_on(e, trust)}.")
    else:
        low, high = trust.idxmin(), trust.idxmax()
        ends = [f"{short(trust[row], e)} (p_y = {p_y[row]:.6g})" for row in (low, high)]
        rest = f"; {others_zero(len(zero))}" if len(zero) else ""
        said.append(f"Trust: {where_read(e)}the label is trusted by {' to '.join(ends)}{beside(e)}{rest}.")
    down = pushed_down(e)
    if len(down):
        at, count = p_y[down], f"{len(down)} of {n} tokens"
        alarm = (
            "WARNING: the" if (e.table["q_label"][down] < -floor(e)).any() else "The"
        )  # below p_y is a choice, below 0 hardly
        pulls = e.mixture is not None and e.mixture.explains and "the label" in e.mixture.parts
        reason = ": there the other pulls are stronger" if pulls and not trust.empty and trust.min() >= 0 else ""
        said.append(f"{alarm} label is pushed DOWN on {count} ({span(at, '.6g')}){reason}.")
    return said


def uncoupled(e: Any) -> bool:
    """Whether the loss pulls raw logits without a softmax and is no known method: then trust and mixture mean nothing."""
    return e.leak is not None and bool(e.leak.uncoupled) and not (e.registered or (e.nearest and e.nearest[0].same))


def shifted(e: Any) -> str:
    """On which label a token is trained, where it is not its own; "" where it is."""
    if not e.shifted:
        return ""
    places = f"{abs(e.shifted)} place{'s' if abs(e.shifted) > 1 else ''} {'after' if e.shifted > 0 else 'before'}"
    return f"each position is trained on the label {places} the one that it should predict: labels are shifted wrongly"


def sides(e: Any) -> str:
    """Which side of a pair a loss of pairs raises and which it lowers; "" where that is not one and the same on all."""
    chosen = e.tokens.chosen
    if e.scope is None or e.scope.of != "pair" or chosen is None:
        return ""
    trust = net(e)
    known = trust[trust.abs() > digits(e)]
    of_chosen = chosen.cpu().numpy()[known.index]
    ends = known[of_chosen], known[~of_chosen]
    if any(end.empty for end in ends):
        return ""
    if (ends[0] > 0).all() and (ends[1] < 0).all():
        return "it raises the chosen sequences and lowers the rejected ones"
    if (ends[0] < 0).all() and (ends[1] > 0).all():
        return (
            "it raises the REJECTED sequences and lowers the chosen ones, as if the two were swapped or the sign wrong"
        )
    return ""


def _rest(e: Any) -> list[str]:
    table, worst = e.table, e.table["reshape"].max()
    if worst < max(ALIKE, 2 * torch.finfo(e.precision).eps):
        return ["Rest: what the label does not get follows the student's own distribution."]
    at = table.loc[table["reshape"].idxmax(), "p_y"]
    return [f"Rest: the alternatives are reshaped, by up to {worst:.3g} of the mass (p_y = {at:.3g})."]


def _simplex(e: Any) -> list[str]:
    table, said = e.table, []
    n = len(table)
    off = (table["total"] - 1).abs()
    shifted = int((off > 100 * torch.finfo(e.precision).eps).sum()) if e.leak is not None else 0
    if shifted and e.leak is not None:
        cause = e.leak.cause or "the loss sees raw logits, not only their softmax"
        said.append(f"WARNING: sum(Q) is not 1 on {shifted} of {n} tokens (off by up to {off.max():.3g}): {cause}.")
    elif e.leak is not None:
        said.append(f"WARNING: on wider trial tokens sum(Q) is not 1: {e.leak.cause or 'the loss sees raw logits'}.")
    signed = table["negative_mass"] > floor(e)
    if signed.any():
        at = table["p_y"][signed]
        said.append(
            f"Simplex: Q has negative entries on {int(signed.sum())} of {n} tokens ({span(at, '.3g')}; "
            f"negative mass up to {table['negative_mass'].max():.3g})."
        )
    elif not shifted:
        said.append(f"Simplex: Q is a distribution on all {n} tokens.")
    return said


def _rounded(misfit: float) -> str:
    """A misfit in one digit; what is nothing but rounding differs from machine to machine and says no more than that."""
    return f"{misfit:.0e}" if not misfit < 1e-12 else "< 1e-12"
