"""The contract over the whole registry, its stated limits, and the paper's table in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from parameter_strategies import variants
from torch.testing import assert_close

import qlens
from qlens import testing
from qlens.core.autograd import gradient
from qlens.core.scales import PRECISION
from qlens.core.tokens import MODELS
from qlens.registry.registry import temporary
from qlens.testing import CONTRACT, check_variant, random_tokens

BUILT_IN = {
    name: method
    for name, method in qlens.registry.methods().items()
    if method.fn.__module__.startswith("qlens.variants")
}
PRESETS = [f"{name}@{preset}" for name, method in BUILT_IN.items() for preset in method.modes]


@pytest.mark.parametrize("spec", [*BUILT_IN, *PRESETS])
def test_contract(spec, monkeypatch):
    if spec in PRESETS:  # the widest vocabulary takes half of the time, and differs by no preset's constant
        monkeypatch.setattr(testing, "VOCABULARIES", testing.VOCABULARIES[:-1])
    assert set(check_variant(spec)) == set(CONTRACT)


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_identity_at_any_parameters(name, data):
    variant = data.draw(variants(BUILT_IN[name]))
    n, v = data.draw(st.integers(2, 12)), data.draw(st.integers(2, 12))
    tokens = random_tokens(n, v, data.draw(st.floats(0.05, 6)), data.draw(st.integers(0, 10**6)))
    try:
        target = variant.target(tokens)
    except qlens.InputError:  # parameters that do not go together
        assume(False)
    explicit = target.scale[:, None] * (tokens.probs - target.q)
    allowed = dict(rtol=0.0, atol=PRECISION[torch.float64] * max(1.0, float(explicit.abs().max())))
    assert_close(gradient(variant.loss, tokens), explicit, **allowed)
    assert_close(target.grad, explicit, **allowed)


@pytest.mark.parametrize("name", BUILT_IN)
def test_precision_is_as_stated(name):
    for dtype in (torch.float32, torch.bfloat16):
        variant, exact = qlens.get(name), random_tokens(64, 24)
        coarse = exact.replace(**{model: getattr(exact, model).to(dtype) for model in ("logits", *MODELS)})
        exact = exact.replace(**{model: getattr(coarse, model).double() for model in ("logits", *MODELS)})
        expected = variant.target(exact).grad
        leaf = coarse.logits.clone().requires_grad_()
        variant.loss(coarse.replace(logits=leaf)).sum().backward()
        assert leaf.grad.dtype == dtype
        allowed = dict(rtol=0.0, atol=PRECISION[dtype] * max(1.0, float(expected.abs().max())))
        assert_close(variant.target(coarse).grad.double(), expected, **allowed)
        assert_close(leaf.grad.double(), expected, **allowed)


def test_every_built_in_identity_compares_two_definitions():
    assert [name for name in BUILT_IN if qlens.get(name).derived] == []
    assert [name for name in BUILT_IN if qlens.get(name).method.printed is None] == []


def numpy_target(name, z, y, teacher, reference, **params):
    """Unit-scale targets, one token at a time in plain numpy, from the table of the paper."""

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    p, t, r = softmax(z), softmax(teacher), softmax(reference)
    d = np.eye(len(z))[y]
    if name == "sft":
        return d
    if name == "dft":
        return p[y] * d + (1 - p[y]) * p
    if name == "label_smoothing":
        return (1 - params["epsilon"]) * d + params["epsilon"] / len(z)
    if name == "asft_anchored":
        return p[y] * d + params["weight"] * r + (1 - p[y] - params["weight"]) * p
    if name == "kd":
        return t
    if name == "kd_hybrid":
        return (1 - params["weight"]) * d + params["weight"] * t
    guided = p ** (1 - params["eta"]) * t ** params["eta"]
    return p[y] * d + (1 - p[y]) * guided / guided.sum()


TABLE = ("sft", "dft", "label_smoothing(epsilon=0.2)", "asft_anchored(weight=0.3)", "kd", "kd_hybrid(weight=0.3)",
         "target_sft(eta=0.3)")  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), v=st.integers(2, 12), spread=st.floats(0.1, 8))
def test_targets_match_the_papers_table(seed, v, spread):
    tokens = random_tokens(3, v, spread, seed)
    for spec in TABLE:
        variant = qlens.get(spec)
        expected = [
            numpy_target(variant.name, z.numpy(), int(y), t.numpy(), r.numpy(), **variant.params)
            for z, y, t, r in zip(tokens.logits, tokens.labels, tokens.teacher, tokens.reference, strict=True)
        ]
        for target in (variant.target(tokens).at("unit"), qlens.implied_target(variant, tokens)):
            assert_allclose(target.q.numpy(), np.stack(expected), atol=1e-12, err_msg=spec)


def test_losses_match_torch():
    import torch.nn.functional as F

    t = random_tokens(20, 9)
    log_p, log_t = t.logits.log_softmax(-1), t.teacher.log_softmax(-1)
    kl = F.kl_div(log_p, log_t, reduction="none", log_target=True).sum(-1)
    assert_close(qlens.get("kd").loss(t), kl)
    smooth = F.cross_entropy(t.logits, t.labels, label_smoothing=0.1, reduction="none")
    assert_close(qlens.get("label_smoothing").loss(t), smooth)
    nll = F.cross_entropy(t.logits, t.labels, reduction="none")
    assert_close(qlens.get("dft").loss(t), nll * torch.exp(-nll))
    assert_close(qlens.get("kd_hybrid(weight=0.25)").loss(t), 0.75 * nll + 0.25 * kl)


def test_limits_are_approached():
    tokens = random_tokens(40, 11)
    for near, limit in (
        ("target_sft(eta=1e-7)", "dft"),
        ("asft_anchored(weight=1e-7)", "dft"),
        ("label_smoothing(epsilon=1e-7)", "sft"),
    ):
        gap = qlens.get(near).target(tokens).grad - qlens.get(limit).target(tokens).grad
        assert 0 < float(gap.abs().max()) < 1e-5, near


def test_asft_matches_the_papers_table_and_converts():
    tokens = random_tokens(10, 7)
    target = qlens.get("asft_anchored(weight=0.2)").target(tokens)
    p_y = tokens.label_probs
    assert_close(target.scale, p_y + 0.2)
    assert_close(target.trust, p_y / (p_y + 0.2))
    assert_close(target.residual, tokens.log_probs_of("reference").exp())
    assert_close(target.at("unit").trust, p_y)
    assert_close(target.at("structural").scale, target.scale)


def test_impossible_tokens_stay_impossible():
    """-inf logits: 0 log 0 = 0, and the gradient there is exactly zero."""
    tokens = random_tokens(6, 8)
    tokens = tokens.replace(
        labels=tokens.labels % 6,
        **{name: getattr(tokens, name).index_fill(1, torch.tensor([6, 7]), -torch.inf) for name in ("logits", *MODELS)},
    )
    tokens = tokens.replace(negatives=tokens.negatives & ~tokens.one_hot.bool())
    specs = {spec for spec in (*BUILT_IN, *PRESETS) if not spec.startswith("label_smoothing")}  # infinite there
    for name in specs | {"target_sft(eta=0)", "target_sft(eta=1)"}:
        variant = qlens.get(name)
        assert bool(variant.loss(tokens).isfinite().all()), name
        assert_close(qlens.implied_target(variant, tokens).grad, variant.target(tokens).grad)
        assert float(variant.target(tokens).q[:, 6:].abs().max()) == 0.0, name


def test_check_variant_passes_correct_and_fails_wrong_user_methods():
    def good(logits, labels, *, alpha=0.5):
        log_p = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        return -(log_p.detach() * alpha).exp() * log_p

    with pytest.warns(UserWarning, match="a loss without a target of its own"):
        assert set(check_variant(good)) == set(CONTRACT) - {"identity", "structure_as_declared"}

    with temporary():

        @qlens.register("wrong_for_the_test", simplex=True)
        def wrong(tokens):
            return qlens.Target.mix(tokens, trust=1.5, residual="student")

        @wrong.loss
        def wrong_loss(tokens):
            return -tokens.label_log_probs

        with pytest.raises(AssertionError, match="identity") as error_info:
            check_variant("wrong_for_the_test")
        assert "simplex_as_declared" in str(error_info.value)
