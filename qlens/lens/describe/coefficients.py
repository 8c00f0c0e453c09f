"""Trust and label weight of an explanation, in words.

Trust is the label's coefficient b in the decomposition g = b (p - d) + sum_j c_j (p - R_j), so that Q = b d + (1 - b) residual.
The label weight -g_y / (1 - p_y) needs no decomposition; the two are equal where the label is the only part.
"""

from typing import Any

import pandas as pd
import torch

from qlens.lens.identify.matching import written
from qlens.lens.rounding import TOLERANCE

ALIKE = 1e-6
NOTHING, CLOSE = (
    1e-15,
    1e-12,
)  # a gradient per 1 - p_y counts as zero below this share of the largest, where 1 - p_y > CLOSE
ROUGH = 0.05  # coarsest resolution at which two coefficients are still called equal
TRUST = "Trust (the label's coefficient in Q)"
LABEL_WEIGHT = "Label weight (-g_y / (1 - p_y))"


def known_label_weight(e: Any) -> pd.Series:
    """The label weight on the tokens where it is more than rounding."""
    weight = e.table["label_weight"].dropna()
    if e.precision == torch.float64:
        return weight
    rest = 1 - e.table["p_y"][weight.index]
    known = weight[rest > min(100 * torch.finfo(e.precision).eps, ROUGH)]
    return known if len(known) else weight


def coefficient(e: Any) -> tuple[str, pd.Series]:
    """The label's coefficient on the tokens with a gradient, by name: trust where a decomposition is known, else label weight."""
    mixture, zero = e.mixture, without_gradient(e)
    weight = known_label_weight(e)
    weight = weight[~weight.index.isin(zero)]
    if mixture is None or not mixture.explains or "the label" not in mixture.parts:
        return LABEL_WEIGHT, weight
    rows = e.table.index[mixture.index.numpy()]
    trust = pd.Series(mixture.trust.numpy(), index=rows)[mixture.sure.numpy()]
    trust = trust[~trust.index.isin(zero)]
    few = len(trust) * 2 < int((mixture.unique.numpy() & ~rows.isin(zero)).sum())
    if (few or resolution(e) >= ROUGH) and not is_constant(e):
        return LABEL_WEIGHT, weight  # rounding leaves too few tokens, or too few digits
    if is_constant(e):
        trust = pd.Series(e.law.values["c"], index=trust.index)
    return TRUST, trust


def without_gradient(e: Any) -> pd.Index:
    """The tokens without any gradient, other than those of p_y = 1 and those whose class or position weight is 0."""
    size, rest = e.figures["grad_norm"], e.figures["rest"]
    open_tokens = rest > CLOSE
    relative = torch.where(open_tokens, size / rest, 0.0)
    zero = open_tokens & (relative <= NOTHING * relative.max())
    if is_constant(e) and e.mixture is not None and len(e.mixture.parts) > 1:  # parts may cancel where they coincide
        identifiable = torch.ones(len(e.table), dtype=torch.bool)
        identifiable[e.mixture.index[~e.mixture.unique]] = False
        zero &= identifiable
    if e.position_weights is not None:
        zero &= torch.tensor(e.position_weights.weights) != 0
    if e.class_weights is not None and e.class_weights.equal:
        zero &= e.class_weights.of(e.tokens.labels).cpu() != 0
    return e.table.index[zero.numpy()]


def coverage(e: Any, values: pd.Series) -> str:
    """On which tokens a constant coefficient holds, and what the other tokens get."""
    n, zero = len(e.table), without_gradient(e)
    where = "" if e.law is None else e.law.where
    if len(zero):
        rule = f" ({where})" if where else ""
        return f"{n - len(zero)} of {n} tokens{rule}{extra_factor(e)}; {remaining_zero(len(zero))}"
    if where:
        return f"every token shown{extra_factor(e)}; beyond these tokens it is 0 except {where}"
    known = len(values) if e.mixture is None or len(values) < len(e.mixture.index) else n
    if known == n or is_constant(e) or not (e.mixture is not None and e.mixture.explains):
        return f"every token{extra_factor(e)}"
    return f"{known} of {n} tokens{extra_factor(e)} (rounding hides it on the others)"


def remaining_zero(number: int) -> str:
    """A clause: that many other tokens have no gradient."""
    return "the other one has no gradient" if number == 1 else f"the other {number} have no gradient"


def extra_factor(e: Any) -> str:
    """The factor besides the coefficient, in parentheses; "" where there is none."""
    if e.batch_factor is not None and not e.batch_factor.spec:
        return " (times a factor of the batch)"
    if e.batch_factor is not None:
        return f" (times {e.batch_factor.here / e.batch_factor.constant:.4g} in this batch)"
    if e.position_weights is not None:
        return " (times the weight of its position)"
    if e.class_weights is not None and e.class_weights.equal:
        return " (times its class weight)"
    return ""


def batch_prefix(e: Any) -> str:
    """The prefix "in this batch " where a statement may hold in the batch read only, else ""."""
    if e.scope is None or e.scope.of == "token" or e.scope.through == ("number",) or e.registered:
        return ""
    divided = e.class_weights is not None and e.class_weights.divided
    if e.batch_factor is not None or e.position_weights is not None or divided:
        return ""
    return "" if e.nearest and e.nearest[0].same else "in this batch "


def all_equal(values: pd.Series, e: Any) -> bool:
    """Whether a coefficient is the same on all tokens."""
    return bool(values.max() - values.min() < resolution(e) * max(abs(values.max()), 1))


def pushed_down(e: Any) -> pd.Index:
    """The tokens whose label loses probability: their label weight is negative."""
    weight = known_label_weight(e)
    return weight.index[weight < -resolution(e)]


def p_y_range(p_y: pd.Series, form: str) -> str:
    """The range of p_y in words."""
    low, high = format(p_y.min(), form), format(p_y.max(), form)
    return f"p_y = {low}" if low == high else f"p_y from {low} to {high}"


def is_constant(e: Any) -> bool:
    """Whether the label's coefficient is one number on all tokens."""
    return e.law is not None and set(e.law.values) == {"c"} and e.law.formula[-1].isdigit()


def resolution(e: Any) -> float:
    """The smallest difference between two coefficients that is more than rounding."""
    return ALIKE if e.mixture is None else min(max(ALIKE, 2 * (e.mixture.digits - TOLERANCE)), ROUGH)


def rounded(value: float, e: Any) -> str:
    """A coefficient as printed, without digits that are rounding."""
    return f"{written(float(value), resolution(e)) + 0.0:.4g}"
