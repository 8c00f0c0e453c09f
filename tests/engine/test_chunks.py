"""Texts and gradients in chunks equal those computed whole; kernels against formulas written out."""

import json
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, llama, rows
from torch.testing import assert_close

import qlens
from qlens.analysis.token_view.summary import summary_of
from qlens.cli import inputs
from qlens.data.from_text import token_batches, tokens_from_examples
from qlens.engine.heads import Head
from qlens.engine.kernels import plain
from qlens.engine.models import backbone
from qlens.lens import implied
from qlens.registry.structure import GeometricMixture
from qlens.testing import random_tokens

EXAMPLES = [row for row in rows(6) if any(label >= 0 for label in row["labels"])]


def joined(parts):
    return {name: torch.cat([part.fields()[name] for part in parts]) for name in parts[0].fields()}


def test_token_batches_in_chunks_equal_whole_ones():
    for entries in [1, 3 * VOCAB, 10**6]:
        with case(entries):
            models = dict(teacher=llama(1), reference=llama(2))
            needs = ("negatives", "old", "second")
            whole = joined(list(token_batches(llama(), EXAMPLES, 2, needs, **models)))
            parts = list(token_batches(llama(), EXAMPLES, 2, needs, entries, **models))
            assert max(part.logits.numel() for part in parts) <= max(entries, VOCAB)
            actual = joined(parts)
            assert actual.keys() == whole.keys()
            for name, value in whole.items():
                assert_close(actual[name], value, rtol=1e-5, atol=1e-5)


@contextmanager
def head_rows():
    """The numbers of rows of which a head computes logits, in order."""
    sizes, plain = [], Head.logits

    def watched(self, where, buffer=None):
        z = plain(self, where, buffer)
        sizes.append(len(z))
        return z

    with mock.patch.object(Head, "logits", watched):
        yield sizes


def test_only_one_chunk_of_logits_is_computed_at_a_time():
    model, teacher = llama(), llama(1)
    with head_rows() as sizes:
        parts = list(token_batches(model, EXAMPLES, 3, (), 2 * VOCAB, teacher=teacher))
    proofs = 2 * [backbone.TRIAL_TOKENS]  # of each model's head, once
    assert sorted(sizes)[-2:] == proofs and max(sorted(sizes)[:-2]) <= 2
    assert sum(len(part) for part in parts) == sum(len(t) for t in token_batches(model, EXAMPLES, 3))


def test_a_subset_of_tokens_is_evenly_spread():
    for most in [1, 5, 1000]:
        with case(most):
            model = llama()
            whole = tokens_from_examples(model, EXAMPLES, batch_size=2, needs=("negatives",))
            few = tokens_from_examples(model, EXAMPLES, batch_size=2, needs=("negatives",), most=most)
            chosen_rows = torch.linspace(0, len(whole) - 1, min(most, len(whole))).long()
            for name, value in whole[chosen_rows].fields().items():
                assert_close(few.fields()[name], value, rtol=1e-5, atol=1e-5)


def test_logits_are_computed_at_the_tokens_that_are_read():
    for build, number in [
        (lambda: tokens_from_examples(llama(), EXAMPLES, batch_size=2, most=7), 7),
        (lambda: qlens.Watch(["dft", "gem"], EXAMPLES, tokens=5, batch_size=2).record(llama(), 0), 5),
    ]:
        with head_rows() as sizes:
            build()
        assert sum(sizes) == number + backbone.TRIAL_TOKENS, "the head is verified once"


def test_a_watch_of_a_method_of_texts_reads_whole_texts():
    of_texts = qlens.Watch("iw_sft", EXAMPLES, reference=llama(1), tokens=5, batch_size=2)
    of_texts.record(llama(), 0)
    whole = tokens_from_examples(llama(), EXAMPLES, reference=llama(1), batch_size=2)
    target = qlens.get("iw_sft").target(whole)[torch.linspace(0, len(whole) - 1, 5).long()]
    assert_close(torch.tensor(of_texts.frame["label_weight"]), target.label_weight.double(), rtol=1e-5, atol=1e-6)


def test_a_head_is_verified_once(monkeypatch):
    proved, plain = [], backbone.Backbone._verify
    monkeypatch.setattr(backbone.Backbone, "_verify", lambda self, few: proved.append(self.model) or plain(self, few))
    model, teacher = llama(), llama(1)
    tokens_from_examples(model, EXAMPLES, teacher=teacher, batch_size=1, most=3)
    assert proved == [model, teacher]


def test_explain_reports_the_subset_of_a_long_text(tmp_path, capsys, monkeypatch):
    from tiny_models import letters

    model = llama()
    model.save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": "the cat sat"}) + "\n" for _ in range(4)))
    options = (str(tmp_path / "model"), None, None, inputs.Source(str(tmp_path / "data.jsonl")), 4, "cpu", None, ())
    whole = inputs.own_tokens(*options)["tokens"]
    monkeypatch.setattr(inputs, "MOST", 7 * VOCAB)
    few = inputs.own_tokens(*options)["tokens"]
    assert len(few) == 7 < len(whole)
    assert "7 of these tokens are read, evenly spread" in capsys.readouterr().err
    assert len(inputs.own_tokens(*options, thin=False)["tokens"]) == len(whole)


@pytest.mark.parametrize("spec", ["dft", "target_sft", "gem", "iw_sft", "mile"])
def test_chunked_gradients_equal_whole_ones(monkeypatch, spec):
    tokens, sizes = random_tokens(20, 9), []
    whole = qlens.implied_target(spec, tokens)
    plain = implied.gradient
    monkeypatch.setattr(implied, "ENTRIES", 3 * 9)
    monkeypatch.setattr(implied, "gradient", lambda value, some: sizes.append(len(some)) or plain(value, some))
    chunked = qlens.implied_target(spec, tokens)
    assert sizes == ([20] if spec in ("iw_sft", "mile") else [3] * 6 + [2])
    assert_close(chunked.q, whole.q, rtol=1e-12, atol=1e-12)


def test_chunked_views_equal_whole_ones(monkeypatch):
    variants = [qlens.get(spec) for spec in ("sft", "target_sft")]
    whole = summary_of(llama(), EXAMPLES, variants, 5, teacher=llama(1))
    monkeypatch.setattr("qlens.analysis.token_view.summary.ENTRIES", 2 * VOCAB)
    actual = summary_of(llama(), EXAMPLES, variants, 5, teacher=llama(1))
    assert (actual.ids == whole.ids).mean() > 0.95  # ties may fall otherwise
    assert_close(torch.tensor(actual.models["nll"]), torch.tensor(whole.models["nll"]), rtol=1e-4, atol=1e-5)
    for spec, frame in whole.methods.items():
        assert_close(
            torch.tensor(actual.methods[spec].to_numpy()),
            torch.tensor(frame.to_numpy()),
            rtol=1e-3,
            atol=1e-4,
            equal_nan=True,
        )


def test_the_label_kernel_with_impossible_tokens():
    z = torch.tensor([[2.0, -torch.inf, -torch.inf], [1.0, 1.0, -torch.inf]], dtype=torch.float64)
    log_p, rest = plain.label_gradient_(z, torch.tensor([[0], [0]]))
    assert_close(log_p.exp(), torch.tensor([1.0, 0.5]).double())
    assert_close(rest.exp(), torch.tensor([0.0, 0.5]).double())
    assert_close(z, torch.tensor([[-1.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]).double())


@settings(max_examples=60, deadline=None)
@given(
    own=st.sampled_from([0.0, 0.3, 1.0]),
    other=st.sampled_from([0.0, 0.7, 1.0]),
    kl=st.booleans(),
    trust=st.floats(-0.5, 1.5),
    scale=st.floats(0.1, 3),
    impossible=st.booleans(),
    seed=st.integers(0, 99),
)
def test_in_place_mixtures_equal_explicit_ones(own, other, kl, trust, scale, impossible, seed):
    tokens = random_tokens(5, 7, spread=3.0, seed=seed)
    z, y = tokens.logits.clone(), tokens.teacher.clone()
    if impossible:  # an entry that neither model allows
        column = (tokens.labels + 1) % 7
        z[torch.arange(5), column] = y[torch.arange(5), column] = -torch.inf
    p, pi = z.softmax(-1), y.softmax(-1)
    r = torch.where(p > 0, p**own * pi**other, 0.0 if own or other else 1.0)
    r = r / r.sum(-1, keepdim=True)
    if own == other == 0:
        r = torch.full_like(p, 1 / 7)
        if impossible:
            return  # toward an impossible entry the value is infinite
    t = torch.full((5,), trust, dtype=torch.float64)
    d = torch.nn.functional.one_hot(tokens.labels, 7).double()
    expected = p - trust * d - (1 - trust) * r
    far = -torch.special.xlogy(r, p).sum(-1) + kl * torch.special.xlogy(r, r).sum(-1)
    value = scale * (-trust * p.gather(1, tokens.labels[:, None])[:, 0].log() + (1 - trust) * far)
    labels, structure_value = tokens.labels[:, None], "kl" if kl else "cross_entropy"
    if own == other == 0:
        terms = plain.uniform_terms_(z, labels)
        mixture = GeometricMixture(None, own, other, structure_value)
        losses = plain.uniform_gradient_(z, labels, terms, t, mixture)
        z -= (1 - t)[:, None] / 7
    else:
        terms = plain.mixture_terms_(z, y, labels, GeometricMixture("teacher", own, other, structure_value))
        losses = plain.mixture_gradient_(z, labels, terms, t)
    assert_close(scale * z, scale * expected, rtol=1e-11, atol=1e-11)
    assert_close(scale * losses, value, rtol=1e-11, atol=1e-11)
