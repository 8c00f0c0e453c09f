"""Explanations: what they find in losses nobody registered, among them wrong ones."""

import json

import pytest
import torch
import torch.nn.functional as F
from cases import case
from explained import explained
from losses import forgot_detach, label_log_probs, root_weighted

import qlens
from qlens.core.probes import SWEEP, probes
from qlens.lens.identify import matching
from qlens.testing import random_tokens


def test_probes_are_what_they_say():
    tokens = probes()
    torch.testing.assert_close(tokens.label_probs, torch.tensor(SWEEP * 3, dtype=torch.float64))
    peaked = tokens.probs[9].sort(descending=True).values  # p_y = 0.5
    torch.testing.assert_close(peaked[:2], torch.tensor([0.5, 0.45], dtype=torch.float64))
    others = [tokens.log_probs] + [tokens.log_probs_of(name) for name in ("teacher", "reference", "old", "second")]
    gaps = [float((a - b).abs().max()) for i, a in enumerate(others) for b in others[:i]]
    assert min(gaps) > 0.1


def test_trust_of_a_root_weighted_loss_is_the_root():
    read = explained(root_weighted)
    torch.testing.assert_close(torch.tensor(read.table["label_weight"]), torch.tensor(read.table["p_y"]).sqrt())
    assert float(read.table["reshape"].max()) < 1e-12
    assert str(read.nearest[0]) == "gce(q=0.5): the same gradient" and read.law.formula == "p_y^0.5"
    assert "Simplex: Q is a distribution on all 57 tokens." in read.findings


def test_a_forgotten_detach_is_found():
    read = explained(forgot_detach)
    p = torch.tensor(read.table["p_y"])
    torch.testing.assert_close(torch.tensor(read.table["label_weight"]), p * (1 + p.log()))
    assert any("WARNING: the label is pushed DOWN on 24 of 57 tokens" in finding for finding in read.findings)
    assert any("negative entries" in finding for finding in read.findings)


def test_raw_logits_are_found():
    read = qlens.explain(lambda logits, labels: F.cross_entropy(logits, labels) + 0.01 * logits.square().sum(-1).mean())
    assert any("sum(Q) is not 1 on 57 tokens" in f or "sum(Q) is not 1 on 57 of 57" in f for f in read.findings)
    assert not any("Q is a distribution on all" in finding for finding in read.findings)


def test_reshaped_alternatives_are_found():
    read = explained("label_smoothing")
    assert any("Reshaping: Q moves up to" in finding for finding in read.findings)
    assert "Trust (the label's coefficient in Q): 0.9 on every token." in read.findings
    assert read.summary.startswith("This is label_smoothing, registered") and "The residual is uniform." in read.summary
    assert "away from uniform" not in read.summary


def nearest_to_its_loss(name):
    variant = qlens.get(name)
    match = qlens.explain(lambda tokens: variant.loss(tokens)).nearest[0]
    return match.spec, match.relation


def test_methods_written_by_hand_find_themselves():
    for name in ["target_sft", "topk_kd", "dpo", "mile"]:
        with case(name):
            assert nearest_to_its_loss(name) == (name, "identical")


def test_a_factor_is_found_and_a_registered_loss_is_not_its_own_neighbour():
    tokens = probes()
    grad = qlens.get("dft").target(tokens).grad
    found = {m.spec: m for m in matching.nearest(2.5 * grad, tokens) if m.relation == "up to a factor"}
    assert found["dft"].factor == pytest.approx(2.5) and found["dft"].misfit < 1e-12
    assert found["mae"].factor == pytest.approx(1.25) and next(iter(found)) == "dft"
    assert "dft" not in [m.spec for m in explained("dft").nearest]


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

    read = qlens.explain(typed)
    assert read.target.q.dtype == torch.float32 and "V = 32, float32)" in str(read)
    assert read.scope is not None and read.scope.detached is False
    assert read.nearest[0].spec == "sft" and read.nearest[0].relation == "identical"


def test_own_tokens_and_their_pieces():
    tokens = random_tokens(50, 9)
    read = qlens.explain("dft", tokens, token_text="abcdefghi".__getitem__)
    assert set(read.table["shape"]) == {"text"} and len(read.table) == 50
    assert read.table["label"].tolist() == ["abcdefghi"[int(y)] for y in tokens.labels]
    assert (read.representative["p_y"].diff().dropna() > 0).all()
    with pytest.raises(qlens.InputError, match="no rows"):
        qlens.explain("dft", tokens[:0])


def test_a_loss_that_breaks_is_named():
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
    read = explained("kd")
    text = str(read)
    assert text.startswith("kd: the target it trains toward") and "Nearest methods (" in text
    again = json.loads(json.dumps(read.to_dict()))
    assert len(again["table"]) == 57 and again["nearest"][0]["spec"].partition("(")[0] in qlens.names()


def test_the_figure_shows_the_table():
    read = explained("dft")
    figure = read.plot()
    drawn = [line for ax in figure.axes for line in ax.get_lines() if len(line.get_xdata()) == len(SWEEP)]
    assert len(figure.axes) >= 3 and drawn


def test_losses_that_cast_inside_are_read_in_float64_and_their_precision_is_said():
    def casts(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"][..., :-1, :].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[..., 1:].flatten())

    read = qlens.explain(casts)
    assert read.target.q.dtype == torch.float64 and read.to_dict()["precision"] == "float32"
    assert "V = 32, float64; the loss computes in float32)" in str(read)
    assert (read.nearest[0].spec, read.nearest[0].relation) == ("sft", "identical")
    assert not any("WARNING" in finding for finding in read.findings)
    coarse = qlens.explain(lambda logits, labels: F.cross_entropy(logits.bfloat16(), labels))
    assert coarse.findings[0].startswith(
        "Precision: read with the loss's casts replaced by float64; bfloat16 changes the gradient"
    )
    assert (
        coarse.nearest[0].spec == "sft"
        and coarse.own_precision is not None
        and 1e-4 < coarse.own_precision.usual < 0.02
    )


def test_a_gradient_of_zero_and_a_target_below_the_label_are_said():
    assert "zero on every token" in qlens.explain(lambda logits, labels: (0 * logits).sum()).findings[0]
    smoothed = explained("label_smoothing").findings
    assert any(finding.startswith("The label is pushed DOWN on 15 of 57 tokens") for finding in smoothed)


def test_losses_may_write_on_what_they_are_given():
    def writes(logits, labels):
        logits -= logits.max(-1, keepdim=True).values
        labels[labels == 3] = 4
        return F.cross_entropy(logits, labels)

    tokens = probes()
    before = tokens.logits.clone(), tokens.labels.clone()
    read = qlens.explain(writes, tokens)
    assert torch.equal(tokens.logits, before[0]) and torch.equal(tokens.labels, before[1])
    kept = tokens.labels != 3
    torch.testing.assert_close(read.target.q[kept], tokens.one_hot[kept])


def test_a_wrong_sign_and_an_undefined_value_are_said():
    read = qlens.explain(lambda logits, labels: -F.cross_entropy(logits, labels))
    assert str(read.nearest[0]) == "sft x -1: the same gradient up to this factor"
    undefined = qlens.explain(lambda logits, labels: (label_log_probs(logits, labels).exp() - 1).log().mean())
    assert "the loss is not finite on 57 of 57 tokens" in undefined.findings[0]


def test_a_leak_stays_undone_on_a_thinned_text():
    tokens = random_tokens(900, 600, spread=2.0)  # more entries than methods are compared on
    read = qlens.explain(lambda logits, labels: F.cross_entropy(30 * torch.tanh(logits / 30), labels), tokens)
    assert read.shift_variance.cause == "a soft-cap: 30 tanh(z / 30)"
    assert (read.nearest[0].spec, read.nearest[0].relation) == ("sft", "identical")


def test_a_method_is_named_first_and_the_simplest_up_to_a_factor():
    half = qlens.explain(lambda logits, labels: 0.5 * F.cross_entropy(logits, labels))
    assert half.summary.startswith("This is sft times 0.5")
    own = explained("sft")
    assert own.summary.startswith("This is sft, registered: Standard SFT. rpsft has the same gradient.")
    smoothed = qlens.explain(lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.23))
    assert smoothed.summary.startswith("This is label_smoothing(epsilon=0.23).")


def test_losses_with_a_top_k_of_their_own_are_read_at_a_wider_vocabulary():
    def top_50(logits, labels):
        with torch.no_grad():
            top = logits.topk(50, -1).values.log_softmax(-1)
            weight = -(top.exp() * top).sum(-1) / torch.tensor(50.0).log()
        return (weight * F.cross_entropy(logits, labels, reduction="none")).mean()

    read = qlens.explain(top_50)
    assert read.tokens.logits.shape == (57, 160) and read.on_probes
    assert read.nearest[0].spec == "eaft(k=50)" and read.law.formula == "H_top-50 / ln 50"


def test_losses_made_for_one_vocabulary_are_read_at_it():
    weights = torch.arange(1, 11, dtype=torch.float64)
    read = qlens.explain(lambda logits, labels: F.cross_entropy(logits, labels, weights, reduction="none"))
    assert read.tokens.logits.shape == (57, 10) and read.nearest[0].spec == "sft" and read.nearest[0].factor == 1
    assert read.class_weights.weights == {i: i + 1.0 for i in range(10)}


def test_weights_are_read_and_missed():
    def keeps(logits, labels, weight):
        return (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / len(labels)

    def drops(logits, labels, weight):
        return F.cross_entropy(logits, labels)

    kept, dropped = qlens.explain(keeps), qlens.explain(drops)
    assert kept.law.formula == "weight" and not kept.unused_inputs
    assert (
        dropped.unused_inputs == ("weight",)
        and dropped.nearest[0].spec == "sft"
        and any("weight has no effect" in finding for finding in dropped.findings)
    )


def test_own_tokens_are_no_probes_even_if_there_are_57():
    tokens = random_tokens(57, 9)
    read = qlens.explain("dft", tokens)
    assert not read.on_probes and set(read.table["shape"]) == {"text"} and "57 tokens" in str(read)


def test_a_forgotten_log_softmax_is_said_and_nothing_that_it_would_mean_with_one():
    read = qlens.explain(F.nll_loss)
    assert read.summary.startswith("It raises the label's raw logit by 1 and takes nothing from the others")
    assert (
        "so that Q = p + d" in read.summary
        and "log(Z)" not in read.text(full=True)
        and "Trust" not in read.text(full=True)
    )
    assert read.precision == torch.float64 and any("sum(Q) is not 1 on 57 of 57" in line for line in read.findings)


def test_the_side_of_a_pair_that_is_raised_is_said():
    def swapped(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        margin = policy_chosen_logps - policy_rejected_logps - reference_chosen_logps + reference_rejected_logps
        return -F.logsigmoid(-0.1 * margin).mean()

    assert "It raises the chosen sequences and lowers the rejected ones" in explained("dpo").summary
    read = qlens.explain(swapped)
    assert "It raises the REJECTED sequences and lowers the chosen ones" in read.summary
    assert any(line.startswith("WARNING: pairs: it raises the REJECTED sequences") for line in read.findings)


def _clamped_logits(logits, labels):
    return F.cross_entropy(logits.clamp(max=2), labels, reduction="none")


@pytest.mark.real
def test_methods_are_named_right_on_a_chat_model_in_any_precision():
    from real import smollm2
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
            read = qlens.explain(lambda tokens, variant=variant: variant.loss(tokens), tokens)
            assert read.shift_variance is None and (read.nearest[0].spec, read.nearest[0].relation) == (
                name,
                "identical",
            )
            assert read.read_in == f"read in float64; logits {str(dtype).removeprefix('torch.')}"
