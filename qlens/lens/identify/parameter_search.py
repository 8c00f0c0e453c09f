"""Parameter search: the registered method and parameters with the gradient of a loss, between the points of matching."""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from qlens.core.tokens import Tokens
from qlens.lens.identify import matching
from qlens.lens.identify.matching import Match
from qlens.lens.identify.parameter_fits import ROUNDS, Fit, ThresholdFit, pushes_only
from qlens.lens.rounding import TOLERANCE, Noise, rounding
from qlens.registry import get, methods

NEAR = 1e-3  # relative misfit up to which a method counts as near
SEARCHED = 6  # nearest methods whose parameters are searched


def search(
    grad: Float[Tensor, "N V"], tokens: Tokens, skip: str = "", most: int = SEARCHED, noise: Noise | None = None
) -> list[Match]:
    """Registered methods at fitted parameters that have a gradient up to a factor, simplest first.

    Args:
        grad: logit gradients of the unreduced loss, (N, V); a few dozen rows are enough.
        tokens: the tokens that they belong to.
        skip: the name of a method to leave out (the loss's own).
        most: how many methods to search.
        noise: rounding error of the gradient; by default estimated from its digits.

    Example:
        >>> import qlens
        >>> t = qlens.probes()
        >>> search(qlens.get("gce(q=0.35)").target(t).grad, t, skip="gce")[0].spec
        'beyond_log(alpha=0.35)'
    """
    return search_with_near(grad, tokens, skip, most, noise)[0]


def search_with_near(
    grad: Float[Tensor, "N V"],
    tokens: Tokens,
    skip: str = "",
    most: int = SEARCHED,
    noise: Noise | None = None,
    fields: Collection[str] | None = None,
) -> tuple[list[Match], list[str]]:
    """The matches of ``search``; and, where there are none, the specs that have the gradient up to ``NEAR``, nearest first.

    A clamp on probabilities, for example, changes the gradient only of entries that have hardly any.

    Args:
        grad: logit gradients of the unreduced loss, (N, V).
        tokens: the tokens that they belong to.
        skip: the name of a method to leave out.
        most: how many methods to search.
        noise: rounding error of the gradient.
        fields: fields of Tokens that the loss takes; methods that need another are left out. None: unknown.
    """
    tokens, noise = tokens.in_float64(), noise or rounding(grad, tokens)
    possible = [
        m for m in methods().values() if m.name != skip and (fields is None or set(m.variant().needs) <= set(fields))
    ]
    fits = [Fit(method, grad, tokens, noise) for method in possible]
    kinds = {pushes_only(grad, tokens, noise), pushes_only(grad, tokens, noise, NEAR)}
    fits = [fit for fit in fits if np.isfinite(fit.best) and kinds & fit.kinds]
    for fit in fits:
        fit.glance()
    matches = [match for fit in fits if fit.best <= TOLERANCE and (match := _match_of(fit))]
    ranked = sorted(fits, key=lambda fit: fit.best)
    for fit in ranked[: 0 if matches else most]:
        if fit.search() and (match := _match_of(fit)):
            matches.append(match)
            break
    near = [] if matches else [fit for fit in ranked if fit.best <= NEAR]
    return matching.ranked(matches), [fit.method.variant(**fit.simpler()).spec for fit in near]


def refined(
    spec: str, grad: Float[Tensor, "N V"], tokens: Tokens, noise: Noise, numbers: Sequence[float] = ()
) -> Match | None:
    """A method fitted to a gradient on all tokens, starting from given parameters; None where it does not have the gradient.

    All tokens are needed because thresholds and clips affect only a few.

    Args:
        spec: the method, at parameters that have the gradient on most tokens.
        grad: logit gradients of the unreduced loss, (N, V).
        tokens: the tokens that they belong to.
        noise: rounding error of the gradient.
        numbers: possible values of thresholds, besides the usual ones.
    """
    variant = get(spec)
    if not variant.params or not all(getattr(tokens, field) is not None for field in variant.needs):
        return None
    fit = ThresholdFit(variant.method, grad, tokens.in_float64(), noise)
    fit.params, fit.numbers = dict(variant.params), numbers
    fit.best = fit.cost(fit.params)
    for _ in range(ROUNDS):
        before = fit.best
        for name in [name for name, value in fit.params.items() if not isinstance(value, bool | str)]:
            fit.scan([name])
            fit.narrow(name)
        if fit.best <= TOLERANCE or fit.best >= before:
            break
    fit.polish()
    match = _match_of(fit) if fit.best <= TOLERANCE else None
    return match if match is not None and fit.pinned(dict(get(match.spec).params)) else None


def _match_of(fit: "Fit") -> Match | None:
    """The match at the fitted parameters, simplified; None where that is not the gradient up to a factor."""
    match = matching.at(fit.method.variant(**fit.simpler()), fit.grad, fit.tokens, fit.noise)
    return match if match and match.same else None
