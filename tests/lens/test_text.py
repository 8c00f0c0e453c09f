"""Long texts: analysed on some tokens, confirmed on all of them, with the figures of a whole reading."""

import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose

import qlens
from qlens.core.probes.trial_tokens import random_tokens
from qlens.lens.reading import Reading
from qlens.lens.text import explained
from qlens.lens.text.chunks import Comparison
from qlens.lens.text.sampling import rows_over_p
from qlens.registry import resolve

N, V = 420, 500


@pytest.fixture(autouse=True)
def short_texts_are_long(monkeypatch):
    """The size from which a text is read some rows at a time, so that a small vocabulary shows it."""
    monkeypatch.setattr("qlens.lens.explain.WHOLE", 2**16)


def text(seed=0, **fields):
    tokens = random_tokens(N, V, spread=3.0, seed=seed)
    likely = tokens.logits.topk(40, -1).indices[torch.arange(N), torch.arange(N) % 40]  # p_y from 1e-4 to .9
    return qlens.Tokens(
        logits=tokens.logits.float(), labels=torch.where(torch.arange(N) % 3 > 0, likely, tokens.labels), **fields
    )


def explain(loss, tokens, **options):
    return qlens.explain(loss, tokens, progress=False, **options)


def flat(e):
    return e.text().replace("\n    ", " ")


def own_weight(logits, labels):
    log_p = F.log_softmax(logits, -1)
    label = log_p.gather(1, labels[:, None])[:, 0]
    return -(0.2 + label.exp().detach().sqrt()) * label + 0.1 * (log_p.exp() ** 2).sum(-1)


def test_a_chunked_reading_has_the_numbers_of_a_whole_one(monkeypatch):
    tokens = text()
    for loss in ("dft", "eaft@axolotl", own_weight):
        by_rows = explain(loss, tokens)
        assert by_rows.coverage is not None and by_rows.coverage.tokens == N and len(by_rows.coverage.rows) < N
        with monkeypatch.context() as patch:
            patch.setattr("qlens.lens.explain.WHOLE", 2**30)
            whole = explain(loss, tokens)
        assert whole.coverage is None
        for column in ("p_y", "loss", "label_weight", "reshape", "q_label", "q_runner_up", "total", "label_grad"):
            assert_allclose(by_rows.table[column], whole.table[column], rtol=1e-5, atol=1e-9, err_msg=column)
        assert (by_rows.table["runner_up"] == whole.table["runner_up"]).all()
        torch.testing.assert_close(by_rows.target.grad, whole.target.grad.float(), rtol=1e-5, atol=1e-9)
        assert set(by_rows.mixture.parts) == set(whole.mixture.parts) and by_rows.mixture.explains
        assert {name: law and law.formula for name, law in by_rows.laws.items()} == {
            name: law and law.formula for name, law in whole.laws.items()
        }
        assert by_rows.residual == whole.residual and len(by_rows.mixture.index) == N


def test_the_method_is_confirmed_on_every_token():
    e = explain(lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.23), text())
    assert e.nearest[0].spec == "label_smoothing(epsilon=0.23)" and e.nearest[0].same
    assert "the method, the decomposition and its weights were compared on all of them" in flat(e)
    assert not len(e.coverage.exceptions)


def test_tokens_that_differ_are_added_to_the_analysis():
    tokens = text()
    order = tokens.label_probs.argsort()
    odd = order[[101, 207, 301]]  # not among the tokens that are analysed first
    assert not bool(torch.isin(rows_over_p(tokens, explained.ANALYSED, explained.ENTRIES), odd).any())
    special = tokens.labels[odd]

    def by_label(logits, labels):
        loss = F.cross_entropy(logits, labels, reduction="none")
        return torch.where(torch.isin(labels, special), 3.0 * loss, loss)

    e = explain(by_label, tokens)
    assert not len(e.coverage.exceptions)
    assert set(special.tolist()) <= set(e.class_weights.unusual)
    limits = tokens.label_probs.double()[order[[100, 101, 102]]]
    low, high = float(limits[:2].mean()), float(limits[1:].mean())

    def by_p(logits, labels):
        log_p = F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
        within = (log_p.exp() > low) & (log_p.exp() < high)
        return torch.where(within, -(log_p**2), -log_p)

    e = explain(by_p, tokens)
    assert int(order[101]) in e.coverage.rows
    assert not e.nearest[0].same


def test_a_sum_of_two_terms_is_confirmed_on_every_token():
    tokens = text()
    at = tokens.label_probs.double()[(order := tokens.label_probs.argsort())[[100, 101, 102]]]
    low, high = float(at[:2].mean()), float(at[1:].mean())

    def plus_brier(t, least=2.0, most=2.0):
        p = t.label_probs.detach()
        factor = torch.where((p > least) & (p < most), 0.9, 0.37)
        return qlens.get("sft").loss(t) + factor * qlens.get("brier").loss(t)

    e = explain(lambda tokens: plus_brier(tokens), tokens)
    assert e.two_terms.terms == ("sft", "brier") and e.two_terms.factors == (1.0, 0.37)
    assert "the sum of two terms" in e.coverage.confirmed and not len(e.coverage.exceptions)
    other = resolve(lambda tokens: plus_brier(tokens, low, high))
    shown = Reading.of(other, tokens[:8].with_precision(torch.float64))
    comparison = Comparison(other, tokens, shown, None, [], None, {}, e.two_terms)
    comparison.run([slice(0, 200), slice(200, N)])
    assert comparison.exceptions.tolist() == [int(order[101])]


def test_a_near_match_is_counted_on_every_token():
    tokens = text()
    e = explain(lambda logits, labels: F.cross_entropy(logits, labels, reduction="none").clamp(max=4), tokens)
    number = int((F.cross_entropy(tokens.logits.double(), tokens.labels, reduction="none") < 4).sum())
    assert e.near_match.spec == "sft" and e.coverage.near == number and 0 < number < N
    assert f"The near match holds on {number} of the {N} tokens, up to 1 %." in flat(e)


def test_a_clip_that_never_acts_on_the_text_is_reported():
    tokens = text()
    old = tokens.logits + 1e-3 * torch.randn(N, V, generator=torch.Generator().manual_seed(0))
    near = qlens.Tokens(logits=tokens.logits, labels=tokens.labels, old=old, advantage=torch.ones(N))
    e = explain("ppo_clip", near)
    assert "On your text the threshold of" in flat(e) and "excludes no token" in flat(e), e.text()
    moved = tokens.logits.clone()
    rows = torch.arange(0, N, 7)
    moved[rows, tokens.labels[rows]] -= 2.0  # p_y / old_y above the clip
    far = qlens.Tokens(logits=tokens.logits, labels=tokens.labels, old=moved, advantage=torch.ones(N))
    e = explain("ppo_clip", far)
    (number,) = e.coverage.excluded.values()
    ratio = (far.label_log_probs - far.gather(far.log_probs_of("old"))).exp()
    assert number == int((ratio > 1.2).sum()) > 0
    assert f"excludes {number} of {N} tokens" in flat(e)


def test_losses_of_whole_sequences_are_not_chunked():
    tokens = random_tokens(N, V)
    e = explain("simpo", tokens)
    assert e.coverage is None and e.scope.of == "pair"

    def centred(logits, labels):
        loss = F.cross_entropy(logits, labels, reduction="none")
        return loss * (loss > loss.mean()).detach()

    assert explain(centred, text()).coverage is None


def test_a_teacher_in_a_closure_is_not_chunked():
    tokens = text()
    teacher = random_tokens(N, V, seed=3).logits.float().softmax(-1)

    def distil(logits, labels):
        return -(teacher * F.log_softmax(logits, -1)).sum(-1)

    e = explain(distil, tokens, residuals={"my teacher": teacher})
    assert e.coverage is None and e.residual == "my teacher"
    e = explain(lambda logits, labels: F.cross_entropy(logits, labels), tokens, residuals={"my teacher": teacher})
    assert e.coverage is not None
    with pytest.raises(qlens.InputError, match=r"residuals\['short'\] has shape"):
        explain("sft", tokens, residuals={"short": teacher[:5]})


def test_progress_is_shown_on_stderr(capsys):
    qlens.explain("sft", text())
    assert f"reading {N} tokens: " in capsys.readouterr().err
    explain("sft", text())
    assert capsys.readouterr().err == ""


def test_a_text_is_read_under_inference_mode_and_nothing_is_printed(capsys):
    def talks(logits, labels):
        print("called")
        return F.cross_entropy(logits, labels, reduction="none")

    with torch.inference_mode():
        tokens = text()
        e = explain(talks, tokens)
    assert e.coverage is not None and e.nearest[0].spec == "sft"
    assert capsys.readouterr().out == ""
