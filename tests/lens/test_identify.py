"""Identifying: methods found again from their gradient alone, at parameters between the points that are listed."""

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


def test_methods_between_their_points_are_found_with_their_numbers():
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
            found = search(variant.target(T).grad, T)
            (mine,) = [match for match in found if params.parse(match.spec)[0] == variant.name]
            assert mine.relation == "identical"
            for name, value in params.parse(spec)[1].items():
                got = qlens.get(mine.spec).params[name]
                if isinstance(value, float):
                    assert_close(got, value, rtol=1e-5, atol=0)
                else:
                    assert got == value


def test_a_factor_is_found_with_the_parameters():
    found = search(2.5 * qlens.get("kd(temperature=3.0)").target(T).grad, T)
    assert any(match.relation == "up to a factor" and abs(match.factor - 2.5) < 1e-6 for match in found) or any(
        match.relation == "identical" for match in found
    )


def test_what_is_nobody_s_is_not_found():
    grad = qlens.get("dft").target(T).grad * (1 + 0.3 * torch.sin(7 * T.label_probs))[:, None]
    assert search(grad, T) == []


def test_a_method_is_not_its_own_neighbour():
    found = search(qlens.get("gce(q=0.35)").target(T).grad, T, skip="gce")
    assert found[0].spec == "beyond_log(alpha=0.35)" and "gce" not in {params.parse(match.spec)[0] for match in found}


def test_losses_of_the_label_alone_are_told_from_others():
    told = {
        name: pushes_only(qlens.get(name).target(T).grad, T) for name in ("sft", "dft", "dpo", "kd", "gem", "brier")
    }
    assert told == {"sft": True, "dft": True, "dpo": True, "kd": False, "gem": False, "brier": False}


def test_default_and_mode_are_both_said():
    near = matching.nearest(qlens.get("eaft(normalizer=None)").target(T).grad, T)
    assert near[0].spec in ("eaft(normalizer=None)", "eaft(normalizer=1.0)")
    by_factor = [match for match in near if match.spec == "eaft" and match.relation == "up to a factor"]
    assert len(by_factor) == 1
    assert_close(by_factor[0].factor, 2.995732, rtol=1e-5, atol=0)


def test_clips_beyond_the_defaults_are_found_on_the_trial_tokens():
    tokens = trials()
    for near, wanted in (
        ("grpo", "grpo(eps_high=0.28)"),
        ("grpo(objective='cispo')", "grpo(objective='cispo', eps_high=1.28)"),
        ("ppo_clip", "ppo_clip(dual=3.0)"),
        ("ppo_clip", "ppo_clip(eps_low=0.3, eps_high=0.4)"),
        # beyond the clip only the small penalty is left: there the wrong clip is off by a thousand times the gradient
        ("grpo(eps_high=0.3, weight=0.001)", "grpo(eps_high=0.28, weight=0.001)"),
        ("grpo(weight=0.0001)", "grpo(eps_low=0.3, eps_high=0.4, weight=0.0001)"),
    ):
        grad = qlens.get(wanted).target(tokens).grad
        got = refined(near, grad, tokens, rounding(grad, tokens))
        assert got is not None and (got.spec, got.relation) == (wanted, "identical"), (near, wanted, got)
    grad = qlens.get("profit(threshold=0.13)").target(tokens).grad  # no token has a p_y from .12 to .15
    assert refined("profit", grad, tokens, rounding(grad, tokens)) is None


def test_the_simplest_setting_is_named():
    tokens = T
    p = tokens.label_probs
    push = (0.1 + 9.2103 * p)[:, None] * (tokens.probs - tokens.one_hot)
    assert search(push, tokens)[0].spec == "sce(log_zero=-9.2103)"


def test_a_parameter_that_is_nothing_is_zero():
    grad = qlens.get("bootstrap_soft(beta=0.0, detach=False)").target(T).grad
    fit = Fit(methods()["bootstrap_soft"], grad, T, rounding(grad, T))
    fit.params = {"beta": 8e-17, "detach": False}
    assert fit.simpler() == {"beta": 0.0, "detach": False}
