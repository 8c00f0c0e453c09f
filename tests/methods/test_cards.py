"""Cards: their formulas of trust, residual and scale are those of the gradient."""

import pytest
import torch
from card_formulas import claim
from torch.testing import assert_close

import qlens
from qlens.core.autograd import gradient
from qlens.core.probes import WIDE, probes
from qlens.registry import cards, methods

BUILT_IN = [name for name, method in methods().items() if method.fn.__module__.startswith("qlens.variants")]
TOKENS = probes()
WIDE_TOKENS = probes(vocabulary=WIDE)  # more entries than the top k of topk_kd


def problems(name, **changed):
    """What is wrong with a card's formulas, in words: the gradient of the loss, the label weight, the names in use."""
    variant, tokens = qlens.get(name), WIDE_TOKENS if name == "topk_kd" else TOKENS
    card = {key: cards.summary(variant)[key] for key in ("trust", "residual", "scale")} | changed
    stated, grad = claim(card, tokens, variant.params), gradient(variant.loss, tokens)
    size = grad.abs().amax(-1, keepdim=True).clamp(min=1)
    expected = stated.scale * (tokens.probs - stated.q)
    if not bool(((expected - grad).abs() <= 1e-6 * size).all()):
        yield "s (p - Q) of trust, residual and scale is not the gradient"
    target = variant.target(tokens)
    label_weight = not stated.is_mixture or target.label_only  # elsewhere trust is part of the construction
    measured = target.label_weight if label_weight else target.constructed
    if measured is not None:
        measured = measured[:, None]
        if not bool(((stated.trust - measured).abs() <= 1e-5 * measured.abs().clamp(min=1)).all()):
            yield "trust is not the label's coefficient"
    if target.label_only and card["residual"].partition(";")[0] != "student":
        yield f"residual {card['residual']!r}, though the label is the only target"


@pytest.mark.parametrize("name", BUILT_IN)
def test_card_formulas_match_the_gradient(name):
    assert not list(problems(name))


def test_wrong_cards_are_found():
    for name in BUILT_IN:
        for wrong in ({"trust": "0.37 p_y"}, {"residual": "uniform"}, {"residual": "old"}, {"scale": "2"}):
            if name == "label_smoothing" and wrong == {"residual": "uniform"}:
                continue
            assert list(problems(name, **wrong)), (name, wrong)


def test_card_formulas_are_read_as_mathematics():
    tokens = TOKENS[:5]
    p_y = tokens.label_probs[:, None]
    for formula, expected in (
        ("2 p_y^2 / (1 - p_y)", 2 * p_y**2 / (1 - p_y)),
        ("1 where p_y >= x, else x p_y", torch.where(p_y >= 0.001, 1.0, 0.001 * p_y)),
        ("c - c_y, with m = 2 p, c = m / 2", p_y - p_y),
        ("-log(p_y); other: 3", -p_y.log()),
    ):
        value = claim({"trust": formula, "residual": "student", "scale": "1"}, tokens, {"x": 0.001}).trust
        if formula.startswith("c - c_y"):
            value = value.gather(1, tokens.labels[:, None])
        assert_close(value, expected, msg=formula)
    for formula in ("p_y +", "2 unknown", "p_y ) 3", "p & q"):
        with pytest.raises((ValueError, KeyError)):
            claim({"trust": formula, "residual": "student", "scale": "1"}, tokens, {})
