"""Words: what was found, a line each, and as a person would say it."""

from typing import Any

import pandas as pd

from qlens.findings.mixtures import RAW
from qlens.lens import COARSE, carried
from qlens.target import Target

ALIKE = 1e-6


def lines(e: Any) -> list[str]:
    """What a reader should know of an explanation, warnings first."""
    broken = int((~e.target.grad.isfinite().all(-1)).sum())
    if broken:
        return [f"WARNING: the gradient is not finite on {broken} of {len(e.table)} tokens."]
    if not bool(e.target.grad.any()):
        return ["WARNING: the gradient is zero on every token: Q = p, nothing is taught."]
    digits, said = carried(e.target.grad), []
    if digits in COARSE:
        said.append(f"Precision: the gradient holds {str(digits).removeprefix('torch.')} digits only.")
    undefined = int((~e.losses.isfinite()).sum())
    if undefined:
        said.append(f"WARNING: the loss is not finite on {undefined} of {len(e.table)} tokens.")
    said += [f"WARNING: the loss writes on the {name} it is given." for name in e.written]
    said += [*_trust(e.table), *_rest(e.table), *_mixture(e), *_simplex(e)]
    if e.scope is not None:
        said.append(f"Scope: {e.scope}")
    return said + ([f"Elsewhere: {e.elsewhere}"] if e.elsewhere else [])


def paragraph(e: Any) -> str:
    """What a person would say about this loss."""
    if not bool(e.target.grad.isfinite().all()):
        return "This loss cannot be trained on as it is: its gradient is not a number."
    if not bool(e.target.grad.any()):
        return "This loss teaches nothing: its gradient is zero everywhere."
    said = [_identity(e), _said_of_trust(e), _said_of_rest(e)]
    if e.leak is not None:
        why = e.leak.cause or "in a way that is not one of the known ones"
        said.append(f"It sees raw logits beyond their softmax ({why}), so that its target does not add up to one.")
    negative = e.table["negative_mass"]
    if (negative > 0).any() and e.leak is None:
        said.append(
            f"Its target is signed, with up to {negative.max():.2g} of negative mass: it pushes some tokens down harder than any "
            "distribution could."
        )
    if e.scope is not None and e.scope.of != "token":
        said.append(f"What one token learns depends on the rest of its {e.scope.of}.")
    return " ".join(part for part in said if part)


def _identity(e: Any) -> str:
    best = e.nearest[0] if e.nearest else None
    besides = " (that apart)" if e.leak is not None and e.leak.cause else ""
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
    return f"No registered method has this gradient; the nearest, {best.spec}, is {best.angle:.0f} degrees away."


def _said_of_trust(e: Any) -> str:
    m = e.mixture
    if m is not None and m.explains:
        if "the label" not in m.parts:
            return "The label has no pull of its own."
        at = m.index[m.unique].numpy()
        trust = pd.Series(m.trust[m.unique].numpy(), index=e.table.index[at])
    else:
        trust = e.table["trust"].dropna()
    if trust.empty:
        return ""
    law = f", by the law {e.law.formula}" if e.law is not None else ""
    low, high = trust.min(), trust.max()
    if high - low < ALIKE * max(abs(high), 1):
        whole = "in full" if abs(high - 1) < ALIKE else f"by {high:.4g}"
        return f"It trusts every label alike, {whole}, however unlikely the model finds it."
    p_y = e.table.loc[trust.index, "p_y"]
    if (trust < -ALIKE).any():
        down = p_y[trust < -ALIKE]
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
    away = [name for name in others if bool((e.mixture.parts[name] < -ALIKE).any())]
    toward = [name for name in others if name not in away]
    said = []
    if toward:
        said.append(f"The rest goes to {_and(toward)}{_left_over(e)}.")
    if away:
        said.append(f"It pushes away from {_and(away)}.")
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


def _trust(table: pd.DataFrame) -> list[str]:
    trust, p_y = table["trust"].dropna(), table["p_y"]
    if trust.empty:
        return ["Every p_y is 1 here: nothing is left to trust."]
    said = []
    low, high = trust.idxmin(), trust.idxmax()
    if trust[high] - trust[low] < ALIKE:
        said.append(f"Trust: the label is trusted by {trust[high]:.4g} on every token.")
    else:
        ends = [f"{trust[row]:.4g} (p_y = {p_y[row]:.6g})" for row in (low, high)]
        said.append(f"Trust: the label is trusted by {' to '.join(ends)}.")
    down = trust < -ALIKE
    if down.any():
        rows = table.loc[trust[down].index]
        at, count = rows["p_y"], f"{int(down.sum())} of {len(table)} tokens"
        alarm = "WARNING: the" if (rows["q_label"] < 0).any() else "The"  # below p_y is a choice, below 0 hardly
        said.append(f"{alarm} label is pushed DOWN on {count} (p_y from {at.min():.6g} to {at.max():.6g}).")
    return said


def _rest(table: pd.DataFrame) -> list[str]:
    worst = table["reshape"].max()
    if worst < ALIKE:
        return ["Rest: what the label does not get follows the student's own distribution."]
    at = table.loc[table["reshape"].idxmax(), "p_y"]
    return [f"Rest: the alternatives are reshaped, by up to {worst:.3g} of the mass (p_y = {at:.3g})."]


def _simplex(e: Any) -> list[str]:
    target: Target = e.target
    table, said = e.table, []
    n = len(table)
    off = (table["total"] - 1).abs()
    coarse = carried(target.grad) in COARSE  # then sums are 1 to two digits only
    shifted = int(((target.total - 1).abs() > 0.05).sum() if coarse else (~target.shift_invariant).sum())
    if shifted:
        cause = (
            e.leak.cause if e.leak is not None and e.leak.cause else "the loss sees raw logits, not only their softmax"
        )
        said.append(f"WARNING: sum(Q) is not 1 on {shifted} of {n} tokens (off by up to {off.max():.3g}): {cause}.")
    signed = table["negative_mass"] > 0
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
