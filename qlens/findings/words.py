"""Words: what was found, a line each, and as a person would say it."""

from typing import Any

import pandas as pd
import torch

from qlens.findings.mixtures import RAW
from qlens.findings.noise import TOLERANCE
from qlens.lens import COARSE
from qlens.matching import written
from qlens.scales import tolerance
from qlens.tokens import expectation

ALIKE = 1e-6


def lines(e: Any) -> list[str]:
    """What a reader should know of an explanation, warnings first."""
    broken = int((~e.target.grad.isfinite().all(-1)).sum())
    if broken:
        return [f"WARNING: the gradient is not finite on {broken} of {len(e.table)} tokens."]
    if e.silent:
        said = "" if not bool(e.target.grad.any()) else " up to rounding"
        return [f"WARNING: the gradient is zero on every token{said}: Q = p, nothing is taught.", *e.notes]
    said = []
    if e.precision in COARSE:
        said.append(f"Precision: the gradient holds {str(e.precision).removeprefix('torch.')} digits only.")
    undefined = int((~e.losses.isfinite()).sum())
    if undefined:
        said.append(f"WARNING: the loss is not finite on {undefined} of {len(e.table)} tokens.")
    said += [f"WARNING: the loss writes on the {name} it is given." for name in e.written]
    said += [
        f"WARNING: {name} has no effect: the loss takes it and neither its value nor its gradient changes."
        for name in e.unused
    ]
    said += [*e.notes, *_trust(e), *_rest(e)]
    if e.nearly is not None:
        said.append(f"Nearly: {e.nearly}.")
    if e.label_weights is not None:
        said.append(f"Label ids: {e.label_weights}.")
    elif e.ids_untried:
        said.append(f"Label ids: not tried; on one token given many ids the loss raises {e.ids_untried}.")
    said += [*_mixture(e), *_simplex(e)]
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
    return [
        f"Tried: p_y down to {float(p.min()):.0e}, entropies up to {entropy:.3g} nats, label ids and ranks up to {size - 1}; "
        "not reached: clamps and thresholds beyond these."
    ]


def paragraph(e: Any) -> str:
    """What a person would say about this loss."""
    if not bool(e.target.grad.isfinite().all()):
        return "This loss cannot be trained on as it is: its gradient is not a number."
    if e.silent:
        up_to = "everywhere" if not bool(e.target.grad.any()) else "up to rounding"
        return f"This loss teaches nothing: its gradient is zero {up_to}."
    said = [_identity(e), _said_of_trust(e), _said_of_rest(e)]
    if e.leak is not None:
        why = e.leak.cause or "in a way that is not one of the known ones"
        said.append(f"It sees raw logits beyond their softmax ({why}), so that its target does not add up to one.")
    if e.label_weights is not None:
        said.append(
            f"It depends on which token the label is: {e.label_weights}; what else is said holds at a weight of 1."
        )
    negative = e.table["negative_mass"]
    if (negative > _floor(e)).any() and e.leak is None:
        said.append(
            f"Its target is signed, with up to {negative.max():.2g} of negative mass: it pushes some tokens down harder than any "
            "distribution could."
        )
    if e.scope is not None and e.scope.through == ("number",):
        where = "there are" if e.scope.of == "batch" else f"its {e.scope.of} has"
        said.append(f"What one token learns depends on how many tokens {where}.")
    elif e.scope is not None and e.scope.of != "token":
        said.append(f"What one token learns depends on the rest of its {e.scope.of}.")
    return " ".join(part for part in said if part)


def _floor(e: Any) -> float:
    """Negative mass that is no more than rounding."""
    return max(tolerance(e.target.q), 20 * torch.finfo(e.precision).eps)


def _identity(e: Any) -> str:
    best = e.nearest[0] if e.nearest else None
    apart = (e.leak is not None and e.leak.cause) or e.label_weights is not None
    besides = " (that apart)" if apart else ""
    if e.registered:
        return f"This is {e.spec}, registered{_title(e)}.{_relative(e)}"
    if best is None:
        return ""
    if best.relation == "identical":
        kin = [m for m in e.nearest[1:] if m.spec == best.spec.partition("(")[0] and m.relation == "up to a factor"]
        that_is = f", which is {kin[0].spec} times {kin[0].factor:.5g}" if kin else ""
        return f"This is {best.spec}{besides}{that_is}."
    if best.relation == "up to a factor":
        if best.factor < 0:
            return f"This is {best.spec} with the wrong sign, times {abs(best.factor):.5g}: training on it unlearns{besides}."
        return f"This is {best.spec} times {best.factor:.5g}{besides}: the same target for an optimizer that ignores scale."
    if e.nearly is not None:
        return f"This is {e.nearly}{besides}."
    return f"No registered method has this gradient; the nearest, {best.spec}, is {_away(best)}."


def _title(e: Any) -> str:
    title = e.variant.title.strip().rstrip(".")
    return f": {title}" if title else ""


def _relative(e: Any) -> str:
    """What else has a registered method's gradient, or comes nearest to it."""
    if not e.nearest:
        return ""
    best = e.nearest[0]
    if best.same:
        factor = "" if best.factor == 1 else f" times {best.factor:.5g}"
        return f" {best.spec}{factor} has the same gradient."
    return f" The nearest other method, {best.spec}, is {_away(best)}."


def _away(match: Any) -> str:
    return f"{match.angle:.0f} degrees away" if match.angle >= 0.5 else f"{match.misfit:.1g} of the gradient away"


def _said_of_trust(e: Any) -> str:
    m = e.mixture
    if m is not None and m.explains:
        if "the label" not in m.parts:
            return "The label has no pull of its own."
        trust = pd.Series(m.trust[m.sure].numpy(), index=e.table.index[m.index[m.sure].numpy()])
        if _constant(e):
            trust = pd.Series(e.law.values["c"], index=e.table.index)
    else:
        trust = _net(e)
    if trust.empty:
        return ""
    law = f", by the law {e.law.formula}" if e.law is not None else ""
    low, high = trust.min(), trust.max()
    if high - low < _digits(e) * max(abs(high), 1):
        whole = "in full" if abs(high - 1) < _digits(e) else f"by {_short(trust.median(), e)}"
        return f"It trusts every label alike, {whole}, however unlikely the model finds it."
    p_y = e.table.loc[trust.index, "p_y"]
    if (trust < -_digits(e)).any():
        down = p_y[trust < -_digits(e)]
        return (
            f"Some labels are pushed down, not up ({len(down)} of {len(trust)} tokens, p_y from {down.min():.2g} to "
            f"{down.max():.2g}){law}."
        )
    order = trust.corr(p_y, method="spearman")
    if order > 0.95:
        return f"The more the model already believes a label, the more it is trusted{law}; labels that surprise it hardly count."
    if order < -0.95:
        return f"The less the model believes a label, the harder it pulls{law}."
    return f"How far a label is trusted varies from {low:.3g} to {high:.3g}{law}."


def _said_of_rest(e: Any) -> str:
    if e.mixture is None:
        return ""
    if not e.mixture.explains:
        return (
            "Where the rest goes is no mixture of the distributions at hand: the best of them leaves "
            f"{e.mixture.closest:.0%} of the gradient unexplained."
        )
    others = [name for name in e.mixture.parts if name not in ("the label", RAW)]
    if not others:
        return "What a label does not get stays with the student's own distribution."
    some = {name: bool(e.mixture.away(name).any()) for name in others}
    always = {name: bool(e.mixture.away(name).all()) for name in others}
    toward = [name for name in others if not some[name]]
    away = [name for name in others if some[name] and always[name]]
    mixed = [name for name in others if some[name] and not always[name]]
    said = []
    if toward:
        said.append(f"The rest goes to {_and(toward)}{_left_over(e)}.")
    if away:
        said.append(f"It pushes away from {_and(away)}.")
    if mixed:
        said.append(f"It pulls toward {_and(mixed)} on some tokens and pushes away from it on others.")
    return " ".join(said)


def _left_over(e: Any) -> str:
    share = 1 - e.mixture.pull[e.mixture.unique]
    return ", what is left stays with the student" if len(share) and float(share.max()) > 1e-3 else ""


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _mixture(e: Any) -> list[str]:
    m = e.mixture
    if m is None:
        return []
    if not m.explains:
        return [
            f"Mixture: none explains the gradient; the best non-negative one of all known distributions leaves {m.closest:.1%}, "
            f"the best signed one of {len(m.parts)} leaves {max(m.misfit, m.held):.1%}."
        ]
    said = [
        f"Mixture: {'signed, ' if m.signed else ''}misfit {_rounded(m.misfit)} ({_rounded(m.held)} on the tokens held out)"
    ]
    for name, pull in m.parts.items():
        known = pull[m.unique]
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
    net, p_y, n = _net(e), e.table["p_y"], len(e.table)
    if net.empty:
        return ["Every p_y is 1 here: nothing is left to trust."]
    m, trust = e.mixture, net
    if m is not None and m.explains and "the label" in m.parts and bool(m.sure.any()):
        trust = pd.Series(m.trust[m.sure].numpy(), index=e.table.index[m.index[m.sure].numpy()])
    if _constant(e):
        trust = pd.Series(e.law.values["c"], index=trust.index)
    said, low, high = [], trust.idxmin(), trust.idxmax()
    if trust[high] - trust[low] < _digits(e) * max(abs(trust[high]), 1):
        said.append(f"Trust: the label is trusted by {_short(trust.median(), e)} on every token.")
    else:
        ends = [f"{_short(trust[row], e)} (p_y = {p_y[row]:.6g})" for row in (low, high)]
        said.append(f"Trust: the label is trusted by {' to '.join(ends)}.")
    down = net < -_digits(e)
    if down.any():
        rows = e.table.loc[net[down].index]
        at, count = rows["p_y"], f"{int(down.sum())} of {n} tokens"
        alarm = (
            "WARNING: the" if (rows["q_label"] < -_floor(e)).any() else "The"
        )  # below p_y is a choice, below 0 hardly
        reason = "" if trust is net or trust.min() < 0 else ": there the other pulls are stronger"
        said.append(f"{alarm} label is pushed DOWN on {count} (p_y from {at.min():.6g} to {at.max():.6g}){reason}.")
    return said


def _constant(e: Any) -> bool:
    """Whether the label's pull is one number on all tokens."""
    return e.law is not None and set(e.law.values) == {"c"} and e.law.formula[-1].isdigit()


def _net(e: Any) -> pd.Series:
    """-g_y / (1 - p_y) where it is more than rounding."""
    trust = e.table["trust"].dropna()
    if e.precision == torch.float64:
        return trust
    rest = 1 - e.table["p_y"][trust.index]
    known = trust[rest > 100 * torch.finfo(e.precision).eps]
    return known if len(known) else trust


def _digits(e: Any) -> float:
    """What counts as a difference between two pulls."""
    return ALIKE if e.mixture is None else max(ALIKE, 2 * (e.mixture.digits - TOLERANCE))


def _short(value: float, e: Any) -> str:
    return f"{written(float(value), _digits(e)):.4g}"


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
    if shifted:
        cause = e.leak.cause or "the loss sees raw logits, not only their softmax"
        said.append(f"WARNING: sum(Q) is not 1 on {shifted} of {n} tokens (off by up to {off.max():.3g}): {cause}.")
    elif e.leak is not None:
        said.append(f"WARNING: on wider trial tokens sum(Q) is not 1: {e.leak.cause or 'the loss sees raw logits'}.")
    signed = table["negative_mass"] > _floor(e)
    if signed.any():
        at = table["p_y"][signed]
        said.append(
            f"Simplex: Q has negative entries on {int(signed.sum())} of {n} tokens (p_y from {at.min():.3g} to {at.max():.3g}; "
            f"negative mass up to {table['negative_mass'].max():.3g})."
        )
    elif not shifted:
        said.append(f"Simplex: Q is a distribution on all {n} tokens.")
    return said


def _rounded(misfit: float) -> str:
    """A misfit in one digit; what is nothing but rounding differs from machine to machine and says no more than that."""
    return f"{misfit:.0e}" if not misfit < 1e-12 else "< 1e-12"
