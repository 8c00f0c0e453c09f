"""Summaries: what was found, as a person would say it."""

from typing import Any

from qlens.lens.decompose.mixture import RAW
from qlens.lens.weights.features import percent
from qlens.lens.weights.trust import (
    alike,
    beside,
    digits,
    pushed_down,
    short,
    span,
    told_on,
    trusted,
    untaught,
    where_read,
)
from qlens.lens.wording import floor, shifted, sides, uncoupled
from qlens.registry.params import parse

ALIKE = 1e-6
LEAST, HARDLY = (
    0.1,
    0.05,
)  # the share of tokens with the least likely labels, and a trust in them that is next to nothing


def paragraph(e: Any) -> str:
    """What a person would say about this loss."""
    if not bool(e.target.grad.isfinite().all()):
        return "This loss cannot be trained on as it is: its gradient is not a number."
    if e.silent:
        up_to = "everywhere" if not bool(e.target.grad.any()) else "up to rounding"
        return f"This loss teaches nothing: its gradient is zero {up_to}."
    if uncoupled(e):
        return f"{e.leak.uncoupled}; its target does not add up to one."
    if e.shifted:
        return f"It trains the wrong token: {shifted(e)}."
    said = [_identity(e), _said_of_trust(e), _said_of_rest(e)]
    if e.leak is not None:
        why = e.leak.cause or "in a way that is not one of the known ones"
        said.append(f"It sees raw logits beyond their softmax ({why}), so that its target does not add up to one.")
    if e.label_weights is not None:
        rest = "; what else is said holds at a weight of 1" if e.label_weights.equal else ""
        said.append(f"It depends on which token the label is: {e.label_weights}{rest}.")
    if e.position_weights is not None:
        said.append(
            f"It weighs a token by its position: {e.position_weights}; what else is said of trust holds at a weight of 1."
        )
    negative = e.table["negative_mass"]
    if (negative > floor(e)).any() and e.leak is None:
        said.append(
            f"Its target is signed, with up to {negative.max():.2g} of negative mass: it pushes some tokens down harder than any "
            "distribution could."
        )
    if e.scope is not None:
        said += _said_of_scope(e.scope)[e.position_weights is not None :]  # its position is said already
    return " ".join(part for part in said if part)


def _said_of_scope(scope: Any) -> list[str]:
    """What else a token's gradient depends on."""
    said = []
    if "position" in scope.through:
        said.append("How much a token counts depends on its position.")
    if set(scope.through) - {"position"} == {"number"}:
        where = "there are" if scope.of == "batch" else f"its {scope.of} has"
        said.append(f"What one token learns depends on how many tokens {where}.")
    elif scope.of != "token":
        effect = f": {scope.effect}" if scope.effect else ""
        said.append(f"What one token learns depends on the rest of its {scope.of}{effect}.")
    return said


def _identity(e: Any) -> str:
    best = e.nearest[0] if e.nearest else None
    apart = (e.leak is not None and e.leak.cause) or e.label_weights is not None or e.position_weights is not None
    besides = " (that apart)" if apart else ""
    placed = e.position_weights
    if placed is not None:
        besides = " with a weight by position"
    if (e.whole and (placed is None or not placed.formula)) or (e.scope is not None and e.scope.effect):
        besides += " on the tokens shown, not on every batch"
    if e.registered:
        return f"This is {e.spec}, registered{_title(e)}.{_relative(e)}"
    if best is None:
        return ""
    if e.by_vocabulary is not None:
        return f"This is {e.by_vocabulary}{besides}."
    if best.same and e.two_terms is not None:
        times = "" if best.factor == 1 else f" times {best.factor:.5g}"
        return f"This is {e.two_terms}{besides}; {best.spec}{times} has the same gradient."
    if best.relation == "identical":
        kin = [m for m in e.nearest[1:] if m.spec == best.spec.partition("(")[0] and m.relation == "up to a factor"]
        that_is = f", which is {kin[0].spec} times {kin[0].factor:.5g}" if kin else ""
        return f"This is {best.spec}{besides}{that_is}."
    if best.relation == "up to a factor":
        if best.factor < 0:
            return f"This is {best.spec} with the wrong sign, times {abs(best.factor):.5g}: training on it unlearns{besides}."
        return f"This is {best.spec} times {best.factor:.5g}{besides}: the same target for an optimizer that ignores scale."
    if e.two_terms is not None:
        return f"No registered method alone has this gradient: it is {e.two_terms}{besides}."
    if e.centred is not None:
        return f"No registered method has this gradient; it is that of {e.centred}."
    if e.gate is not None:
        return f"This is {e.gate}." if e.gate.spec else f"No registered method has this gradient: it has {e.gate}."
    if e.normalised is not None and not e.normalised.spec:
        away = f"the nearest, {best.spec}, is {_away(best)}"
        return f"No registered method has this gradient ({away}): {e.normalised}."
    if e.normalised is not None:
        known = e.normalised.by or e.normalised.switch
        return f"This is {e.normalised.named if known else e.normalised}{'' if known else besides}."
    if e.nearly is not None:
        return f"This is {e.nearly}{besides}."
    best = min(e.nearest, key=lambda match: round(match.angle, 2))
    return f"No registered method has this gradient; the nearest, {best.spec}, is {_away(best)}."


def _title(e: Any) -> str:
    title = e.variant.title.strip().rstrip(".")
    return f": {title}" if title else ""


def _relative(e: Any) -> str:
    """What else has a registered method's gradient, or comes nearest to it."""
    others = [match for match in e.nearest if parse(match.spec)[0] != e.variant.name]
    if not others:
        return ""
    best = others[0]
    if best.same:
        factor = "" if best.factor == 1 else f" times {best.factor:.5g}"
        return f" {best.spec}{factor} has the same gradient."
    return f" The nearest other method, {best.spec}, is {_away(best)}."


def _away(match: Any) -> str:
    return f"{match.angle:.0f} degrees away" if match.angle >= 0.5 else f"{match.misfit:.1g} of the gradient away"


def _said_of_trust(e: Any) -> str:
    m = e.mixture
    if m is not None and m.explains and "the label" not in m.parts:
        return "The label has no pull of its own."
    trust, n = trusted(e), len(e.table)
    if trust.empty:
        return ""
    formula = e.law.formula if e.law is not None else ""
    law = f", by the law {formula}" if formula else ""
    if " values, " in formula:
        law = f": {formula}"
    low, high = trust.min(), trust.max()
    if alike(trust, e):
        if abs(trust.median()) < digits(e):
            return "On the tokens shown no label is trusted: none has a pull of its own."
        whole = "in full" if abs(high - 1) < digits(e) else f"by {short(trust.median(), e)}"
        on = told_on(e, trust)
        if on.startswith("every token") and " shown" not in on:
            return _begun(e, f"It trusts every label alike, {whole}{beside(e)}, however unlikely the model finds it.")
        return _begun(e, f"It trusts labels alike, {whole}, on {on}.")
    if low >= 0 and ("elsewhere" in getattr(e.law, "values", ()) or " values, " in formula):
        return _begun(e, f"How far a label is trusted: {formula}.")
    zero = len(untaught(e))
    rest = f"; {zero} of {n} tokens {'teaches' if zero == 1 else 'teach'} nothing" if zero else ""
    if sides(e):
        return f"I{sides(e)[1:]}{law}{rest}."
    if (trust < -digits(e)).any():
        down = pushed_down(e)
        down = trust.index[trust < -digits(e)] if down.empty else down
        p_y = e.table.loc[down, "p_y"]
        return _begun(
            e, f"Some labels are pushed down, not up ({len(down)} of {n} tokens, {span(p_y, '.2g')}){law}{rest}."
        )
    order = trust.corr(e.table.loc[trust.index, "p_y"], method="spearman")
    if order > 0.95:
        p_y = e.table.loc[trust.index, "p_y"]
        surprised = trust[p_y <= p_y.quantile(LEAST)].abs().max()
        hardly = (
            "; labels that surprise it hardly count" if surprised < HARDLY * high else f", by {low:.3g} to {high:.3g}"
        )
        return _begun(e, f"The more the model already believes a label, the more it is trusted{law}{rest}{hardly}.")
    if order < -0.95:
        return _begun(e, f"The less the model believes a label, the harder it pulls{law}{rest}.")
    return _begun(e, f"How far a label is trusted varies from {low + 0.0:.3g} to {high + 0.0:.3g}{law}{rest}.")


def _begun(e: Any, sentence: str) -> str:
    """A sentence that begins with where it holds, if that is in one batch alone."""
    where = where_read(e)
    return f"{where.capitalize().strip()} {sentence[0].lower()}{sentence[1:]}" if where else sentence


def _said_of_rest(e: Any) -> str:
    if e.mixture is None:
        return ""
    if not e.mixture.explains and e.linear:
        return "There is no softmax in it: it is a margin of raw logits; its gradient changes only where an entry crosses it."
    if not e.mixture.explains:
        return (
            "Where the rest goes is no mixture of the distributions at hand: the best of them leaves "
            f"{percent(e.mixture.closest)} of the gradient unexplained."
        )
    others = [name for name in e.mixture.parts if name not in ("the label", RAW)]
    if not others:
        return "What a label does not get stays with the student's own distribution."
    some = {name: bool(e.mixture.away(name).any()) for name in others}
    always = {name: not bool(e.mixture.toward(name).any()) for name in others}
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
