"""Identification of methods from their gradient alone, at parameters between the listed presets."""

import torch
from cases import case
from torch.testing import assert_close

import qlens
from qlens.core.probes import probes, trials
from qlens.lens.identify import matching
from qlens.lens.identify.parameter_fits import Fit, pushes_only
from qlens.lens.identify.parameter_search import refined, search
from qlens.lens.rounding import rounding
from qlens.registry import methods, params

T = probes()


def test_methods_at_other_parameters_are_identified():
    for spec in [
        "beyond_log(alpha=0.37)",
        "target_sft(eta=0.8)",
        "gem(beta=1.9)",
        "jsd(beta=0.2)",
        "asft_anchored(weight=0.4, direction='reverse')",
        "gift(beta=1.5)",
        "topk_kd(k=5, tail='renorm')",
        "topk_kd(k=1, tail='renorm')",
        "topk_kd(k=2)",
        "dpo(beta=0.35)",
        "mile(gamma=2.5)",
    ]:
        with case(spec):
            variant = qlens.get(spec)
            matches = search(variant.target(T).grad, T)
            (own_match,) = [match for match in matches if params.parse(match.spec)[0] == variant.name]
            assert own_match.relation == "identical"
            for name, value in params.parse(spec)[1].items():
                got = qlens.get(own_match.spec).params[name]
                if isinstance(value, float):
                    assert_close(got, value, rtol=1e-5, atol=0)
                else:
                    assert got == value


def test_a_factor_is_found_with_the_parameters():
    matches = search(2.5 * qlens.get("kd(temperature=3.0)").target(T).grad, T)
    assert any(match.relation == "up to a factor" and abs(match.factor - 2.5) < 1e-6 for match in matches) or any(
        match.relation == "identical" for match in matches
    )


def test_unregistered_losses_match_no_method():
    grad = qlens.get("dft").target(T).grad * (1 + 0.3 * torch.sin(7 * T.label_probs))[:, None]
    assert search(grad, T) == []


def test_a_method_is_not_its_own_neighbour():
    matches = search(qlens.get("gce(q=0.35)").target(T).grad, T, skip="gce")
    assert matches[0].spec == "beyond_log(alpha=0.35)" and "gce" not in {
        params.parse(match.spec)[0] for match in matches
    }


def test_label_only_losses_are_detected():
    label_only = {
        name: pushes_only(qlens.get(name).target(T).grad, T) for name in ("sft", "dft", "dpo", "kd", "gem", "brier")
    }
    assert label_only == {"sft": True, "dft": True, "dpo": True, "kd": False, "gem": False, "brier": False}


def test_default_and_preset_are_both_listed():
    near = matching.nearest(qlens.get("eaft(normalizer=None)").target(T).grad, T)
    assert near[0].spec in ("eaft(normalizer=None)", "eaft(normalizer=1.0)")
    by_factor = [match for match in near if match.spec == "eaft" and match.relation == "up to a factor"]
    assert len(by_factor) == 1
    assert_close(by_factor[0].factor, 2.995732, rtol=1e-5, atol=0)


def test_clips_beyond_the_defaults_are_found_on_the_trial_tokens():
    tokens = trials()
    for near, expected in (
        ("grpo", "grpo(eps_high=0.28)"),
        ("grpo(objective='cispo')", "grpo(objective='cispo', eps_high=1.28)"),
        ("ppo_clip", "ppo_clip(dual=3.0)"),
        ("ppo_clip", "ppo_clip(eps_low=0.3, eps_high=0.4)"),
        # beyond the clip only the small penalty is left: there the wrong clip is off by a thousand times the gradient
        ("grpo(eps_high=0.3, weight=0.001)", "grpo(eps_high=0.28, weight=0.001)"),
        ("grpo(weight=0.0001)", "grpo(eps_low=0.3, eps_high=0.4, weight=0.0001)"),
    ):
        grad = qlens.get(expected).target(tokens).grad
        got = refined(near, grad, tokens, rounding(grad, tokens))
        assert got is not None and (got.spec, got.relation) == (expected, "identical"), (near, expected, got)
    grad = qlens.get("profit(threshold=0.13)").target(tokens).grad  # no token has a p_y from .12 to .15
    assert refined("profit", grad, tokens, rounding(grad, tokens)) is None


def test_the_simplest_setting_is_named():
    tokens = T
    p = tokens.label_probs
    push = (0.1 + 9.2103 * p)[:, None] * (tokens.probs - tokens.one_hot)
    assert search(push, tokens)[0].spec == "sce(log_zero=-9.2103)"


def test_a_negligible_parameter_is_zero():
    grad = qlens.get("bootstrap_soft(beta=0.0, detach=False)").target(T).grad
    fit = Fit(methods()["bootstrap_soft"], grad, T, rounding(grad, T))
    fit.params = {"beta": 8e-17, "detach": False}
    assert fit.simpler() == {"beta": 0.0, "detach": False}
