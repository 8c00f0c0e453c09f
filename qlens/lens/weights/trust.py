"""Trust: on which tokens an explanation trusts labels, by how much, and where that was read."""

from typing import Any

import pandas as pd
import torch

from qlens.lens.identify.matching import written
from qlens.lens.rounding import TOLERANCE

ALIKE = 1e-6
NOTHING, CLOSE = 1e-15, 1e-12  # a pull's share of the largest that is none, where 1 - p_y is larger than so much
ROUGH = 0.05  # two pulls that differ by more are never called alike


def trusted(e: Any) -> pd.Series:
    """The label's pull on the tokens that teach something and on which it is known: from the mixture, else from the table."""
    m, zero = e.mixture, untaught(e)
    whole = net(e)
    whole = whole[~whole.index.isin(zero)]
    if m is None or not m.explains or "the label" not in m.parts:
        return whole
    rows = e.table.index[m.index.numpy()]
    trust = pd.Series(m.trust.numpy(), index=rows)[m.sure.numpy()]
    trust = trust[~trust.index.isin(zero)]
    few = len(trust) * 2 < int((m.unique.numpy() & ~rows.isin(zero)).sum())
    if (few or digits(e) >= ROUGH) and not constant(e):
        return whole  # rounding leaves too few, or too little of them
    if constant(e):
        trust = pd.Series(e.law.values["c"], index=trust.index)
    return trust


def untaught(e: Any) -> pd.Index:
    """The tokens without any gradient, other than those of p_y = 1 and of label ids that have no weight."""
    size, rest = e.target.grad.double().norm(dim=-1), e.tokens.with_precision(torch.float64).rest_log_probs.exp()
    there = rest > CLOSE
    pull = torch.where(there, size / rest, 0.0)
    none = there & (pull <= NOTHING * pull.max())
    if constant(e) and e.mixture is not None and len(e.mixture.parts) > 1:  # pulls may cancel where they cannot be told
        apart = torch.ones(len(e.table), dtype=torch.bool)
        apart[e.mixture.index[~e.mixture.unique]] = False
        none &= apart.to(none.device)
    if e.position_weights is not None:
        none &= torch.tensor(e.position_weights.weights, device=none.device) != 0
    if e.label_weights is not None and e.label_weights.equal:
        none &= e.label_weights.of(e.tokens.labels) != 0
    return e.table.index[none.cpu().numpy()]


def told_on(e: Any, trust: pd.Series) -> str:
    """On which tokens the label is trusted so, and what the others get, in words."""
    n, zero = len(e.table), untaught(e)
    where = "" if e.law is None else e.law.where
    if len(zero):
        rule = f" ({where})" if where else ""
        return f"{n - len(zero)} of {n} tokens{rule}{beside(e)}; {others_zero(len(zero))}"
    if where:
        return f"every token shown{beside(e)}; on wider tokens it is 0 except {where}"
    known = len(trust) if e.mixture is None or len(trust) < len(e.mixture.index) else n
    if known == n or constant(e) or not (e.mixture is not None and e.mixture.explains):
        return f"every token{beside(e)}"
    return f"{known} of {n} tokens, on which it can be told{beside(e)}"


def others_zero(number: int) -> str:
    """That so many other tokens get no pull, in words."""
    return "the other one gets 0" if number == 1 else f"the other {number} get 0"


def beside(e: Any) -> str:
    """What a pull is multiplied by beside what is said of it, in words."""
    if e.normalised is not None and not e.normalised.spec:
        return " (times a factor of the batch)"
    if e.normalised is not None:
        return f" (times {e.normalised.here / e.normalised.constant:.4g} in this batch)"
    if e.position_weights is not None:
        return " (times the weight of its position)"
    if e.label_weights is not None and e.label_weights.equal:
        return " (times the weight of its id)"
    return ""


def where_read(e: Any) -> str:
    """Whether what is said holds in the batch that was read alone, in words."""
    if e.scope is None or e.scope.of == "token" or e.scope.through == ("number",) or e.registered:
        return ""
    if (
        e.normalised is not None
        or e.position_weights is not None
        or (e.label_weights is not None and e.label_weights.divided)
    ):
        return ""
    return "" if e.nearest and e.nearest[0].same else "in this batch "


def alike(trust: pd.Series, e: Any) -> bool:
    """Whether all labels are trusted alike."""
    return bool(trust.max() - trust.min() < digits(e) * max(abs(trust.max()), 1))


def pushed_down(e: Any) -> pd.Index:
    """The tokens whose label is pushed down by all pulls together."""
    whole = net(e)
    return whole.index[whole < -digits(e)]


def span(p_y: pd.Series, form: str) -> str:
    """From the least to the greatest p_y, in words."""
    low, high = format(p_y.min(), form), format(p_y.max(), form)
    return f"p_y = {low}" if low == high else f"p_y from {low} to {high}"


def constant(e: Any) -> bool:
    """Whether the label's pull is one number on all tokens."""
    return e.law is not None and set(e.law.values) == {"c"} and e.law.formula[-1].isdigit()


def net(e: Any) -> pd.Series:
    """-g_y / (1 - p_y) where it is more than rounding."""
    trust = e.table["trust"].dropna()
    if e.precision == torch.float64:
        return trust
    rest = 1 - e.table["p_y"][trust.index]
    known = trust[rest > min(100 * torch.finfo(e.precision).eps, ROUGH)]
    return known if len(known) else trust


def digits(e: Any) -> float:
    """What counts as a difference between two pulls."""
    return ALIKE if e.mixture is None else min(max(ALIKE, 2 * (e.mixture.digits - TOLERANCE)), ROUGH)


def short(value: float, e: Any) -> str:
    """A pull as it is printed, without digits that are rounding."""
    return f"{written(float(value), digits(e)) + 0.0:.4g}"
