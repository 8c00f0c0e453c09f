"""Presets, cards and fields that are functions of the parameters."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

import qlens
from qlens.cli.app import app
from qlens.registry import cards, params, registry
from qlens.registry.params import Positive, Share, Weight
from qlens.testing import random_tokens

pytestmark = pytest.mark.usefixtures("temporary_registry")

BUILT_IN = {n: m for n, m in registry.methods().items() if m.fn.__module__.startswith("qlens.variants")}
DESIGN = """sft label_smoothing dft beyond_log beyond_log_log1mp beyond_log_threshold profit eaft cft iw_sft sft_kl
sft_reverse_kl asft_anchored psft gem kd kd_hybrid target_sft asft_absolute rpsft uft gift idft deft cayley mile focal
gce sce mae brier poly bootstrap_soft bootstrap_hard confidence_penalty unlikelihood r_drop reverse_kl jsd skew_fkl
skew_rkl tvd topk_kd
label_kl token_mask reinforce ppo_clip grpo dpo simpo orpo ipo""".split()


def test_every_method_of_the_plan_is_there():
    assert set(DESIGN) <= set(BUILT_IN)


def test_a_preset_is_a_point_of_the_parameters():
    eaft = qlens.get("eaft@axolotl")
    assert eaft.params["normalizer"] is None and eaft.params == qlens.get(eaft.spec).params
    assert qlens.get("eaft@axolotl(k=5)").params == eaft.params | {"k": 5}
    assert qlens.get("eaft@axolotl", normalizer=3.0).params["normalizer"] == 3.0
    with pytest.raises(qlens.UnknownName, match="unknown preset of eaft 'axolotls'. Did you mean axolotl"):
        qlens.get("eaft@axolotls")
    with pytest.raises(qlens.UnknownName, match="unknown preset of sft"):
        qlens.get("sft@any")


def test_presets_differ_from_the_defaults_and_from_each_other():
    for name, method in BUILT_IN.items():
        points = [qlens.get(f"{name}@{preset}").spec for preset in method.modes]
        assert len({name, *points}) == 1 + len(points), points


def test_a_preset_that_does_not_fit_is_refused_at_registration():
    with pytest.raises(qlens.ParameterError, match="half@double: factor = 'two'"):

        @qlens.register("half", modes={"double": {"factor": "two"}})
        def half(logits, labels, *, factor=0.5):
            return factor * torch.nn.functional.cross_entropy(logits, labels)


def test_fields_of_the_card_may_depend_on_the_parameters():
    token, whole = qlens.get("iw_sft(level='token')"), qlens.get("iw_sft")
    assert (token.scope, whole.scope) == ("token", "sequence")
    assert "sequence" in whole.needs and "sequence" not in token.needs
    assert qlens.get("uft").invariant and not qlens.get("uft@code").invariant
    assert qlens.get("kd").simplex and not qlens.get("kd(temperature=2.0)").simplex


def test_ends_lists_the_bounds_of_each_parameter():
    def f(tokens, *, eta: Share = 0.0, weight: Weight = 0.5, beta: Positive = 2.0, over: bool = False): ...

    assert params.ends(f) == [{"eta": 1.0}, {"weight": 0.0}, {"weight": 1.0}, {"beta": 1.0}, {"over": True}]


def test_tuples_of_any_length_are_checked():
    assert qlens.get("poly(epsilon=(1.0, 0.5))").params["epsilon"] == (1.0, 0.5)
    assert qlens.get("poly(epsilon=[1.0, 0.5])").spec == "poly(epsilon=(1.0, 0.5))"
    for wrong in ("()", "('a',)"):
        with pytest.raises(qlens.ParameterError, match="poly: epsilon"):
            qlens.get(f"poly(epsilon={wrong})")


def test_the_card_shows_every_field():
    for name, method in BUILT_IN.items():
        text = cards.card(qlens.get(name))
        for word in ("trust", "residual", "scale", "needs", "scope", "source", "mean over"):
            assert re.search(rf"^  {word} +\S", text, re.M), (name, word)
        assert all(re.search(rf"^  {re.escape(preset)}\s", text, re.M) for preset in method.modes), name
        flat = re.sub(r"\s+", " ", text)
        assert all(re.sub(r"\s+", " ", sentence) in flat for sentence in method.differences), name
        assert method.family in cards.FAMILIES


def test_the_list_and_the_readme_agree():
    rows = json.loads(CliRunner().invoke(app, ["list", "--json"]).output)
    assert [row["name"] for row in rows] == list(qlens.names())
    table = cards.markdown()
    for row in rows:
        assert f"`{row['name']}`" in table and row["paper"] in table
    assert {"modes", "differences", "code", "limits", "invariant", "cites"} <= set(rows[0])


def test_methods_of_raw_logits_declare_it():
    tokens = random_tokens(20, 9)
    far = tokens.replace(logits=tokens.logits + 120.0, hint=torch.ones(20, dtype=torch.bool))
    target = qlens.get("uft@code").target(far)
    assert "depends on raw logits" in cards.card(qlens.get("uft@code"))
    assert bool(((target.total - 1).abs() > 1e-9).any()) or not bool(target.grad.any())
