"""Summary: an explanation in one paragraph, the method's name first."""

from typing import Any

from qlens.core.display import enumeration
from qlens.lens.decompose.mixture import RAW
from qlens.lens.describe.coefficients import (
    all_equal,
    batch_prefix,
    coefficient,
    coverage,
    extra_factor,
    p_y_range,
    pushed_down,
    resolution,
    rounded,
    without_gradient,
)
from qlens.lens.describe.findings import negative_floor, pair_sides, uncoupled, wrong_shift
from qlens.lens.weights.features import percent
from qlens.registry.params import parse

UNLIKELY, HARDLY = 0.1, 0.05  # share of tokens that count as unlikely labels; their coefficient that hardly counts
NEGLIGIBLE = 1e-3  # share of the student's own distribution in Q


def paragraph(e: Any) -> str:
    """The summary of an explanation."""
    if not bool(e.figures["grad_norm"].isfinite().all()):
        return "This loss cannot be trained on as it is: its gradient is not a number."
    if e.zero_gradient:
        up_to = "everywhere" if not bool(e.figures["grad_norm"].any()) else "up to rounding"
        return f"This loss teaches nothing: its gradient is zero {up_to}."
    if uncoupled(e):
        return f"{e.shift_variance.uncoupled}; its target does not add up to one."
    if e.label_offset:
        return f"It trains the wrong token: {wrong_shift(e)}."
    sentences = [_identity(e), _label(e), _residual(e)]
    if e.shift_variance is not None:
        why = e.shift_variance.cause or "for an unknown reason"
        sentences.append(
            f"Its gradient depends on raw logits beyond their softmax ({why}), so that Q does not add up to one."
        )
    if e.class_weights is not None:
        unit = "; everything else holds at a weight of 1" if e.class_weights.equal else ""
        sentences.append(f"It depends on which token the label is: {e.class_weights}{unit}.")
    if e.position_weights is not None:
        sentences.append(
            f"It weighs a token by its position: {e.position_weights}; coefficients hold at a weight of 1."
        )
    negative = e.table["negative_mass"]
    if (negative > negative_floor(e)).any() and e.shift_variance is None:
        sentences.append(f"Q has negative entries, up to {negative.max():.2g} in total: it is no distribution.")
    if e.scope is not None:
        sentences += _scope(e.scope)[e.position_weights is not None :]  # its position is named already
    return " ".join(filter(None, sentences))


def _scope(scope: Any) -> list[str]:
    """What a token's gradient depends on besides the token."""
    sentences = []
    if "position" in scope.through:
        sentences.append("A token's weight depends on its position.")
    if set(scope.through) - {"position"} == {"number"}:
        where = "there are" if scope.of == "batch" else f"its {scope.of} has"
        sentences.append(f"A token's gradient depends on how many tokens {where}.")
    elif scope.of != "token":
        effect = f": {scope.effect}" if scope.effect else ""
        sentences.append(f"A token's gradient depends on the other tokens of its {scope.of}{effect}.")
    return sentences


def _identity(e: Any) -> str:
    """The registered method that has the gradient, or the nearest one."""
    best = e.nearest[0] if e.nearest else None
    if e.registered:
        return f"This is {e.spec}, registered{_title(e)}.{_other_method(e)}"
    if best is None:
        return ""
    besides = _besides(e)
    if e.by_vocabulary is not None:
        return f"This is {e.by_vocabulary}{besides}."
    if best.same and e.two_terms is not None:
        return f"This is {e.two_terms}{besides}; {best.spec}{_times(best.factor)} has the same gradient."
    if best.relation == "identical":
        related = [m for m in e.nearest[1:] if m.spec == best.spec.partition("(")[0] and m.relation == "up to a factor"]
        also = f", which is {related[0].spec} times {related[0].factor:.5g}" if related else ""
        return f"This is {best.spec}{besides}{also}."
    if best.relation == "up to a factor":
        if best.factor < 0:
            return f"This is {best.spec} with the wrong sign, times {abs(best.factor):.5g}: training on it unlearns{besides}."
        return f"This is {best.spec} times {best.factor:.5g}{besides}: the same target for an optimizer that ignores scale."
    if e.two_terms is not None:
        return f"No registered method alone has this gradient: it is {e.two_terms}{besides}."
    if e.batch_moments is not None:
        return f"No registered method has this gradient; it is that of {e.batch_moments}."
    if e.batch_gate is not None:
        known = "This is" if e.batch_gate.spec else "No registered method has this gradient: it has"
        return f"{known} {e.batch_gate}."
    if e.batch_factor is not None and not e.batch_factor.spec:
        return f"No registered method has this gradient (the nearest, {best.spec}, is {_distance(best)}): {e.batch_factor}."
    if e.batch_factor is not None:
        known = e.batch_factor.by or e.batch_factor.switch
        return f"This is {e.batch_factor.named if known else e.batch_factor}{'' if known else besides}."
    if e.near_match is not None:
        return f"This is {e.near_match}{besides}."
    best = min(e.nearest, key=lambda match: round(match.angle, 2))
    return f"No registered method has this gradient; the nearest, {best.spec}, is {_distance(best)}."


def _besides(e: Any) -> str:
    """What the named method leaves out: raw logits, class weights, position weights, the batch."""
    apart = (e.shift_variance is not None and e.shift_variance.cause) or e.class_weights is not None
    placed = e.position_weights
    text = " with a weight by position" if placed is not None else " (that apart)" if apart else ""
    if (e.whole_batch and (placed is None or not placed.formula)) or (e.scope is not None and e.scope.effect):
        text += " on the tokens shown, not on every batch"
    return text


def _title(e: Any) -> str:
    title = e.variant.title.strip().rstrip(".")
    return f": {title}" if title else ""


def _times(factor: float) -> str:
    return "" if factor == 1 else f" times {factor:.5g}"


def _other_method(e: Any) -> str:
    """The other registered method with the same gradient, or the nearest."""
    others = [match for match in e.nearest if parse(match.spec)[0] != e.variant.name]
    if not others:
        return ""
    best = others[0]
    if best.same:
        return f" {best.spec}{_times(best.factor)} has the same gradient."
    return f" The nearest other method, {best.spec}, is {_distance(best)}."


def _distance(match: Any) -> str:
    return f"{match.angle:.0f} degrees away" if match.angle >= 0.5 else f"{match.misfit:.1g} of the gradient away"


def _label(e: Any) -> str:
    """The label's coefficient: its value or formula, and how it changes with p_y."""
    mixture = e.mixture
    if mixture is not None and mixture.explains and "the label" not in mixture.parts:
        return "The label has no coefficient of its own in Q."
    (name, values), n = coefficient(e), len(e.table)
    if values.empty:
        return ""
    formula = e.law.formula if e.law is not None else ""
    low, high = values.min(), values.max()
    if all_equal(values, e):
        return _constant(e, name, values)
    if low >= 0 and ("elsewhere" in getattr(e.law, "values", ()) or " values, " in formula):
        return _in_batch(e, f"{name}: {formula}.")
    zero = len(without_gradient(e))
    others = f"; {zero} of {n} tokens {'has' if zero == 1 else 'have'} no gradient" if zero else ""
    by = f": {formula}" if formula else ""
    if sides := pair_sides(e):
        return f"{sides[0].upper()}{sides[1:]}{by}{others}."
    if (values < -resolution(e)).any():
        down = pushed_down(e)
        down = values.index[values < -resolution(e)] if down.empty else down
        where = f"{len(down)} of {n} tokens, {p_y_range(e.table.loc[down, 'p_y'], '.2g')}"
        return _in_batch(e, f"{name} is negative on some tokens, whose labels are pushed down ({where}){by}{others}.")
    p_y = e.table.loc[values.index, "p_y"]
    order = values.rank().corr(p_y.rank())  # method="spearman" imports scipy.stats, which takes most of a second
    span = "" if formula else f", from {low + 0.0:.3g} to {high + 0.0:.3g}"
    equals = f" = {formula}" if formula else ""
    if order > 0.95:
        unlikely = values[p_y <= p_y.quantile(UNLIKELY)].abs().max()
        hardly = "; unlikely labels hardly count" if unlikely < HARDLY * high else ""
        return _in_batch(e, f"{name}{equals}: it grows with p_y{span}{hardly}{others}.")
    if order < -0.95:
        return _in_batch(e, f"{name}{equals}: it falls with p_y{span}{others}.")
    return _in_batch(e, f"{name}{equals} varies between tokens, from {low + 0.0:.3g} to {high + 0.0:.3g}{others}.")


def _constant(e: Any, name: str, values: Any) -> str:
    """A coefficient that is the same on all tokens."""
    if abs(values.median()) < resolution(e):
        return f"{name} is 0 on the tokens shown."
    value, on = rounded(values.median(), e), coverage(e, values)
    if on.startswith("every token") and " shown" not in on:
        return _in_batch(e, f"{name} is {value} for every token{extra_factor(e)}, however unlikely the label.")
    return _in_batch(e, f"{name} is {value} on {on}.")


def _in_batch(e: Any, sentence: str) -> str:
    """The sentence, restricted to the batch that was read where it may not hold in others."""
    prefix = batch_prefix(e)
    article = "the " if sentence.startswith("Label weight") else ""
    return f"{prefix.capitalize()}{article}{sentence[0].lower()}{sentence[1:]}" if prefix else sentence


def _residual(e: Any) -> str:
    """The distributions that get the probability which the label does not get."""
    mixture = e.mixture
    if mixture is None:
        return ""
    if not mixture.explains and e.piecewise_linear:
        return "There is no softmax in it: it is a margin of raw logits; its gradient changes only where an entry crosses it."
    if not mixture.explains:
        left = percent(mixture.closest)
        return f"The residual is no mixture of known distributions: the best one leaves {left} of the gradient."
    names = [name for name in mixture.parts if name not in ("the label", RAW)]
    if not names:
        return "The residual is the student's own distribution."
    down = {name: bool(mixture.away(name).any()) for name in names}
    up = {name: bool(mixture.toward(name).any()) for name in names}
    toward = [name for name in names if not down[name]]
    away = [name for name in names if down[name] and not up[name]]
    mixed = [name for name in names if down[name] and up[name]]
    sentences = []
    if toward:
        sentences.append(_toward(e, toward))
    if away:
        sentences.append(f"It pushes away from {enumeration(away)}.")
    if mixed:
        sentences.append(f"It moves toward {enumeration(mixed)} on some tokens and away from it on others.")
    return " ".join(sentences)


def _toward(e: Any, names: list[str]) -> str:
    """A sentence on the distributions with positive weights, by what the weights leave to the student."""
    student = 1 - e.mixture.pull[e.mixture.unique]
    if len(student) and float(student.min()) < -NEGLIGIBLE and "the label" in e.mixture.parts:
        return f"It also moves toward {enumeration(names)}; all weights together exceed 1 on some tokens."
    mixed = ", mixed with the student's own distribution" if len(student) and float(student.max()) > NEGLIGIBLE else ""
    return f"The residual is {enumeration(names)}{mixed}."
