"""Explanations of losses that are not registered, among them faulty ones."""

import json

import pytest
import torch
import torch.nn.functional as F
from cached_explain import cached_explain
from cases import case
from losses import forgot_detach, label_log_probs, root_weighted

import qlens
from qlens.core.probes import SWEEP, probes
from qlens.lens.identify import matching
from qlens.testing import random_tokens


def test_probes_have_the_documented_probabilities():
    tokens = probes()
    torch.testing.assert_close(tokens.label_probs, torch.tensor(SWEEP * 3, dtype=torch.float64))
    peaked = tokens.probs[9].sort(descending=True).values  # p_y = 0.5
    torch.testing.assert_close(peaked[:2], torch.tensor([0.5, 0.45], dtype=torch.float64))
    log_probs = [tokens.log_probs] + [tokens.log_probs_of(name) for name in ("teacher", "reference", "old", "second")]
    gaps = [float((a - b).abs().max()) for i, a in enumerate(log_probs) for b in log_probs[:i]]
    assert min(gaps) > 0.1


def test_trust_of_a_root_weighted_loss_is_the_root():
    explanation = cached_explain(root_weighted)
    torch.testing.assert_close(
        torch.tensor(explanation.table["label_weight"]), torch.tensor(explanation.table["p_y"]).sqrt()
    )
    assert float(explanation.table["reshape"].max()) < 1e-12
    assert str(explanation.nearest[0]) == "gce(q=0.5): the same gradient" and explanation.law.formula == "p_y^0.5"
    assert "Simplex: Q is a distribution on all 57 tokens." in explanation.findings


def test_a_forgotten_detach_is_found():
    explanation = cached_explain(forgot_detach)
    p = torch.tensor(explanation.table["p_y"])
    torch.testing.assert_close(torch.tensor(explanation.table["label_weight"]), p * (1 + p.log()))
    assert any("WARNING: the label is pushed DOWN on 24 of 57 tokens" in finding for finding in explanation.findings)
    assert any("negative entries" in finding for finding in explanation.findings)


def test_raw_logits_are_found():
    explanation = qlens.explain(
        lambda logits, labels: F.cross_entropy(logits, labels) + 0.01 * logits.square().sum(-1).mean()
    )
    assert any("sum(Q) is not 1 on 57 tokens" in f or "sum(Q) is not 1 on 57 of 57" in f for f in explanation.findings)
    assert not any("Q is a distribution on all" in finding for finding in explanation.findings)


def test_reshaped_alternatives_are_found():
    explanation = cached_explain("label_smoothing")
    assert any("Reshaping: Q moves up to" in finding for finding in explanation.findings)
    assert "Trust (the label's coefficient in Q): 0.9 on every token." in explanation.findings
    assert (
        explanation.summary.startswith("This is label_smoothing, registered")
        and "The residual is uniform." in explanation.summary
    )
    assert "away from uniform" not in explanation.summary


def nearest_to_its_loss(name):
    variant = qlens.get(name)
    match = qlens.explain(lambda tokens: variant.loss(tokens)).nearest[0]
    return match.spec, match.relation


def test_handwritten_methods_are_identified():
    for name in ["target_sft", "topk_kd", "dpo", "mile"]:
        with case(name):
            assert nearest_to_its_loss(name) == (name, "identical")


def test_factors_are_found_and_a_method_is_not_its_own_match():
    tokens = probes()
    grad = qlens.get("dft").target(tokens).grad
    matches = {m.spec: m for m in matching.nearest(2.5 * grad, tokens) if m.relation == "up to a factor"}
    assert matches["dft"].factor == pytest.approx(2.5) and matches["dft"].misfit < 1e-12
    assert matches["mae"].factor == pytest.approx(1.25) and next(iter(matches)) == "dft"
    assert "dft" not in [m.spec for m in cached_explain("dft").nearest]


def test_random_gradients_match_nothing():
    tokens = random_tokens(40, 12)
    noise = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert {m.relation for m in matching.nearest(noise - noise.mean(-1, keepdim=True), tokens)} == {"near"}


def test_methods_whose_models_are_missing_are_left_out():
    tokens = random_tokens(10, 5).replace(teacher=None)
    assert not {"kd", "target_sft"} & {m.spec for m in matching.nearest(qlens.get("sft").target(tokens).grad, tokens)}


def test_a_loss_that_insists_on_float32_is_read_in_float32():
    def typed(logits, labels):
        assert logits.dtype == torch.float32
        return F.cross_entropy(logits, labels)

    explanation = qlens.explain(typed)
    assert explanation.target.q.dtype == torch.float32 and "V = 32, float32)" in str(explanation)
    assert explanation.scope is not None and explanation.scope.detached is False
    assert explanation.nearest[0].spec == "sft" and explanation.nearest[0].relation == "identical"


def test_user_tokens_and_token_text():
    tokens = random_tokens(50, 9)
    explanation = qlens.explain("dft", tokens, token_text="abcdefghi".__getitem__)
    assert set(explanation.table["shape"]) == {"text"} and len(explanation.table) == 50
    assert explanation.table["label"].tolist() == ["abcdefghi"[int(y)] for y in tokens.labels]
    assert (explanation.representative["p_y"].diff().dropna() > 0).all()
    with pytest.raises(qlens.InputError, match="no rows"):
        qlens.explain("dft", tokens[:0])


def test_a_raising_loss_is_reported():
    with pytest.raises(qlens.InputError, match="broken raises ZeroDivisionError: division by zero"):

        def broken(logits, labels):
            return logits.sum() / 0 if len(labels) < 0 else 1 / 0

        qlens.explain(broken)


def test_nan_gradients_are_reported():
    def nan(logits, labels):
        p = logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
        return (p - p.detach()).abs().sqrt() - label_log_probs(logits, labels)

    assert qlens.explain(nan).findings == ["WARNING: the gradient is not finite on 57 of 57 tokens."]

    def overflows(logits, labels):
        return F.cross_entropy((logits * 1e4).half() / 1e4, labels)

    assert qlens.explain(overflows).findings[0].startswith("WARNING: the gradient is not finite on")


def test_everything_prints_and_serialises():
    explanation = cached_explain("kd")
    text = str(explanation)
    assert text.startswith("kd: the target it trains toward") and "Nearest methods (" in text
    parsed = json.loads(json.dumps(explanation.to_dict()))
    assert len(parsed["table"]) == 57 and parsed["nearest"][0]["spec"].partition("(")[0] in qlens.names()


def test_the_figure_shows_the_table():
    explanation = cached_explain("dft")
    figure = explanation.plot()
    lines = [line for ax in figure.axes for line in ax.get_lines() if len(line.get_xdata()) == len(SWEEP)]
    assert len(figure.axes) >= 3 and lines


def test_casting_losses_are_read_in_float64_and_their_precision_reported():
    def casts(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"][..., :-1, :].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[..., 1:].flatten())

    explanation = qlens.explain(casts)
    assert explanation.target.q.dtype == torch.float64 and explanation.to_dict()["precision"] == "float32"
    assert "V = 32, float64; the loss computes in float32)" in str(explanation)
    assert (explanation.nearest[0].spec, explanation.nearest[0].relation) == ("sft", "identical")
    assert not any("WARNING" in finding for finding in explanation.findings)
    coarse = qlens.explain(lambda logits, labels: F.cross_entropy(logits.bfloat16(), labels))
    assert coarse.findings[0].startswith(
        "Precision: read with the loss's casts replaced by float64; bfloat16 changes the gradient"
    )
    assert (
        coarse.nearest[0].spec == "sft"
        and coarse.own_precision is not None
        and 1e-4 < coarse.own_precision.usual < 0.02
    )


def test_zero_gradients_and_low_targets_are_reported():
    assert "zero on every token" in qlens.explain(lambda logits, labels: (0 * logits).sum()).findings[0]
    smoothed = cached_explain("label_smoothing").findings
    assert any(finding.startswith("The label is pushed DOWN on 15 of 57 tokens") for finding in smoothed)


def test_losses_may_write_on_their_inputs():
    def writes(logits, labels):
        logits -= logits.max(-1, keepdim=True).values
        labels[labels == 3] = 4
        return F.cross_entropy(logits, labels)

    tokens = probes()
    before = tokens.logits.clone(), tokens.labels.clone()
    explanation = qlens.explain(writes, tokens)
    assert torch.equal(tokens.logits, before[0]) and torch.equal(tokens.labels, before[1])
    unchanged = tokens.labels != 3
    torch.testing.assert_close(explanation.target.q[unchanged], tokens.one_hot[unchanged])


def test_wrong_signs_and_undefined_values_are_reported():
    explanation = qlens.explain(lambda logits, labels: -F.cross_entropy(logits, labels))
    assert str(explanation.nearest[0]) == "sft x -1: the same gradient up to this factor"
    undefined = qlens.explain(lambda logits, labels: (label_log_probs(logits, labels).exp() - 1).log().mean())
    assert "the loss is not finite on 57 of 57 tokens" in undefined.findings[0]


def test_a_soft_cap_is_removed_on_a_thinned_text():
    tokens = random_tokens(900, 600, spread=2.0)  # more entries than methods are compared on
    explanation = qlens.explain(lambda logits, labels: F.cross_entropy(30 * torch.tanh(logits / 30), labels), tokens)
    assert explanation.shift_variance.cause == "a soft-cap: 30 tanh(z / 30)"
    assert (explanation.nearest[0].spec, explanation.nearest[0].relation) == ("sft", "identical")


def test_a_method_is_named_first_and_the_simplest_up_to_a_factor():
    half = qlens.explain(lambda logits, labels: 0.5 * F.cross_entropy(logits, labels))
    assert half.summary.startswith("This is sft times 0.5")
    own = cached_explain("sft")
    assert own.summary.startswith("This is sft, registered: Standard SFT. rpsft has the same gradient.")
    smoothed = qlens.explain(lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.23))
    assert smoothed.summary.startswith("This is label_smoothing(epsilon=0.23).")


def test_losses_with_a_top_k_of_their_own_are_read_at_a_wider_vocabulary():
    def top_50(logits, labels):
        with torch.no_grad():
            top = logits.topk(50, -1).values.log_softmax(-1)
            weight = -(top.exp() * top).sum(-1) / torch.tensor(50.0).log()
        return (weight * F.cross_entropy(logits, labels, reduction="none")).mean()

    explanation = qlens.explain(top_50)
    assert explanation.tokens.logits.shape == (57, 160) and explanation.on_probes
    assert explanation.nearest[0].spec == "eaft(k=50)" and explanation.law.formula == "H_top-50 / ln 50"


def test_losses_made_for_one_vocabulary_are_read_at_it():
    weights = torch.arange(1, 11, dtype=torch.float64)
    explanation = qlens.explain(lambda logits, labels: F.cross_entropy(logits, labels, weights, reduction="none"))
    assert (
        explanation.tokens.logits.shape == (57, 10)
        and explanation.nearest[0].spec == "sft"
        and explanation.nearest[0].factor == 1
    )
    assert explanation.class_weights.weights == {i: i + 1.0 for i in range(10)}


def test_used_and_unused_weights_are_reported():
    def keeps(logits, labels, weight):
        return (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / len(labels)

    def drops(logits, labels, weight):
        return F.cross_entropy(logits, labels)

    weighted, unweighted = qlens.explain(keeps), qlens.explain(drops)
    assert weighted.law.formula == "weight" and not weighted.unused_inputs
    assert (
        unweighted.unused_inputs == ("weight",)
        and unweighted.nearest[0].spec == "sft"
        and any("weight has no effect" in finding for finding in unweighted.findings)
    )


def test_user_tokens_are_not_taken_for_probes():
    tokens = random_tokens(57, 9)
    explanation = qlens.explain("dft", tokens)
    assert not explanation.on_probes and set(explanation.table["shape"]) == {"text"} and "57 tokens" in str(explanation)


def test_a_forgotten_log_softmax_is_reported():
    explanation = qlens.explain(F.nll_loss)
    assert explanation.summary.startswith("It raises the label's raw logit by 1 and takes nothing from the others")
    assert (
        "so that Q = p + d" in explanation.summary
        and "log(Z)" not in explanation.text(full=True)
        and "Trust" not in explanation.text(full=True)
    )
    assert explanation.precision == torch.float64 and any(
        "sum(Q) is not 1 on 57 of 57" in line for line in explanation.findings
    )


def test_the_raised_side_of_a_pair_is_reported():
    def swapped(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        margin = policy_chosen_logps - policy_rejected_logps - reference_chosen_logps + reference_rejected_logps
        return -F.logsigmoid(-0.1 * margin).mean()

    assert "It raises the chosen sequences and lowers the rejected ones" in cached_explain("dpo").summary
    explanation = qlens.explain(swapped)
    assert "It raises the REJECTED sequences and lowers the chosen ones" in explanation.summary
    assert any(line.startswith("WARNING: pairs: it raises the REJECTED sequences") for line in explanation.findings)


def _clamped_logits(logits, labels):
    return F.cross_entropy(logits.clamp(max=2), labels, reduction="none")


@pytest.mark.real
def test_methods_are_named_right_on_a_chat_model_in_any_precision():
    from real_model import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pair = ("How many eggs are left if I eat 2 of 7?", "There are 7 - 2 = 5 eggs left.")
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        tokens = qlens.Tokens.from_text(model, tokenizer, [pair])
        tokens = tokens.replace(teacher=0.8 * tokens.logits)
        clamped = qlens.explain(
            lambda logits, labels: F.cross_entropy(logits.float(), labels, reduction="none").clamp(max=2), tokens
        )
        assert clamped.shift_variance is None and clamped.near_match is not None
        assert clamped.near_match.why.startswith("it is that method where p_y >= 0.135")
        assert clamped.near_match.why.endswith("its gradient is zero, where the loss is held at 2: a clamp")
        assert "This is sft (that apart)" in qlens.explain(_clamped_logits, tokens).summary
        for name in ("dft", "target_sft", "eaft"):
            variant = qlens.get(name)
            explanation = qlens.explain(lambda tokens, variant=variant: variant.loss(tokens), tokens)
            assert explanation.shift_variance is None and (
                explanation.nearest[0].spec,
                explanation.nearest[0].relation,
            ) == (
                name,
                "identical",
            )
            assert explanation.read_in == f"read in float64; logits {str(dtype).removeprefix('torch.')}"
