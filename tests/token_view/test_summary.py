"""Summary of a chunk: metrics and entries against numpy, chunks against the whole, texts of tokens."""

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from tiny_models import letters, llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qlens
from qlens import InputError, Tokens
from qlens.analysis.token_view import summary
from qlens.analysis.token_view.summary import Summary, summarise, summary_of
from qlens.analysis.token_view.token_text import TokenText, completed

N, V = 7, 11
SPECS = ["sft", "dft", "kd", "gem", "label_smoothing"]


@pytest.fixture(scope="module")
def tokens():
    draw = torch.Generator().manual_seed(1)
    logits, teacher = (3 * torch.randn(N, V, generator=draw, dtype=torch.float64) for _ in range(2))
    return Tokens(logits=logits, teacher=teacher, labels=torch.randint(V, (N,), generator=draw))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(tokens):
    """p, the teacher, the labels and Q of every method, from the formulas, in numpy."""
    p, t, y = softmax(tokens.logits.numpy()), softmax(tokens.teacher.numpy()), tokens.labels.numpy()
    d, p_y = np.eye(V)[y], p[np.arange(N), y][:, None]
    q = {"sft": d, "dft": p_y * d + (1 - p_y) * p, "kd": t, "gem": d + p - softmax(tokens.logits.numpy() / 0.7)}
    return p, t, y, q | {"label_smoothing": 0.9 * d + 0.1 / V}


def test_the_metrics_match_their_formulas(tokens):
    summarised = summarise(tokens, [qlens.get(spec) for spec in SPECS])
    p, t, y, targets = by_hand(tokens)
    at = np.arange(N), y
    rest = p.copy()
    rest[at] = 0
    models = summarised.models
    for name, probs in (("label_rank", p), ("teacher_rank", t)):
        assert models[name].tolist() == [1 + (row > row[label]).sum() for row, label in zip(probs, y, strict=True)]
    assert models["label"].tolist() == y.tolist() and models["runner_up"].tolist() == rest.argmax(-1).tolist()
    rest_t = t.copy()
    rest_t[at] = 0
    margin, teacher_margin = np.log(rest.max(-1) / p[at]), np.log(rest_t.max(-1) / t[at])
    expected = {
        "p_y": p[at], "nll": -np.log(p[at]), "entropy": -(p * np.log(p)).sum(-1), "p_other": 1 - p[at],
        "negative_margin_student": margin, "p_runner_up": rest.max(-1), "teacher_y": t[at],
        "negative_margin_teacher": teacher_margin, "disagreement": np.abs(p - t).sum(-1) / 2,
        "negative_margin": np.minimum(margin, teacher_margin),
    }  # fmt: skip
    for name, values in expected.items():
        assert_allclose(models[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    for spec, q in targets.items():
        frame, signed = summarised.methods[spec], (q < -1e-9).any(-1)
        plogp = np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0)
        rescaled = p * ((1 - q[at]) / (1 - p[at]))[:, None]
        distance = np.abs(q - rescaled)
        distance[at] = 0
        expected = {
            "q_y": q[at], "q_other": 1 - q[at], "label_gradient": q[at] - p[at], "label_weight": (q[at] - p[at]) / (1 - p[at]),
            "negative_mass": np.maximum(0, -q).sum(-1), "total": np.ones(N), "reshape": distance.sum(-1) / 2,
            "entropy": np.where(signed, np.nan, -plogp.sum(-1)),
            "kl": np.where(signed, np.nan, (plogp - np.where(q > 0, q * np.log(p), 0)).sum(-1)),
        }  # fmt: skip
        for name, values in expected.items():
            assert_allclose(frame[name], values, rtol=1e-5, atol=1e-6, err_msg=f"{spec}, {name}")
    assert summarised.methods["gem"]["negative_mass"].max() > 0.01


@pytest.mark.parametrize("candidates", [1, 7, 20])
def test_entries_are_the_label_the_largest_moves_and_then_the_largest(tokens, candidates):
    summarised = summarise(tokens, [qlens.get(spec) for spec in SPECS], candidates)
    p, t, y, targets = by_hand(tokens)
    size = min(V, max(candidates, len(SPECS) + 1))
    assert summarised.ids.shape == (N, size)
    for n in range(N):
        forced = {y[n], *(int(np.abs(q[n] - p[n]).argmax()) for q in targets.values())}
        weight = np.max([p[n], *(np.abs(q[n]) for q in targets.values())], 0)
        chosen = set(summarised.ids[n].tolist())
        outside = [weight[k] for k in range(V) if k not in chosen]
        assert len(chosen) == size and forced <= chosen
        assert min([weight[k] for k in chosen - forced], default=1) >= max(outside, default=0) - 1e-6
        assert_allclose(summarised.probs[n], sorted(p[n][summarised.ids[n]], reverse=True), rtol=1e-5)
        assert_allclose(summarised.teacher[n], t[n][summarised.ids[n]], rtol=1e-5)
        for move, q in zip(summarised.moves, targets.values(), strict=True):
            assert_allclose(move[n], (q - p)[n][summarised.ids[n]], atol=1e-6)


def test_the_label_is_always_among_the_entries(tokens):
    summarised = summarise(tokens, [qlens.get("kd")], 1)
    assert summarised.ids.shape == (N, 2) and all(
        label in ids for label, ids in zip(summarised.models["label"], summarised.ids, strict=True)
    )


def assert_same(a: Summary, b: Summary):
    pd.testing.assert_frame_equal(a.models, b.models, rtol=1e-4, atol=2e-6)
    for name, frame in a.methods.items():
        pd.testing.assert_frame_equal(frame, b.methods[name], rtol=1e-4, atol=2e-6)  # a small KL is a difference
    assert_allclose(a.moves, b.moves, atol=1e-6)
    assert a.ids.tolist() == b.ids.tolist()


def examples(lengths):
    draw = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 29, (length,), generator=draw).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]


@pytest.mark.parametrize(("spec", "whole"), [("dft", False), ("iw_sft", True), ("mile", True)])
def test_chunked_summaries_equal_whole_ones(monkeypatch, spec, whole):
    sizes = []
    plain = summarise

    def watched(tokens, *rest, **options):
        sizes.append(len(tokens))
        return plain(tokens, *rest, **options)

    monkeypatch.setattr(summary, "summarise", watched)
    model, reference, variants = llama(0), llama(1), [qlens.get(spec)]
    once = summary_of(model, examples([9, 2, 14]), variants, 6, reference=reference)
    assert sizes == [8, 1, 13]
    sizes.clear()
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(summary, "ENTRIES", 4 * vocabulary)
    assert_same(once, summary_of(model, examples([9, 2, 14]), variants, 6, reference=reference))
    assert sizes == ([8, 1, 13] if whole else [4, 4, 1, 4, 4, 4, 1])


def test_summaries_are_joined_and_indexed(tokens):
    variants = [qlens.get("sft"), qlens.get("gem")]
    whole = summarise(tokens, variants)
    assert_same(whole, Summary.join([summarise(tokens[:3], variants), summarise(tokens[3:], variants)]))
    assert_same(whole[[4, 1]], summarise(tokens[[4, 1]], variants))


def test_missing_inputs_of_a_method_are_named(tokens):
    with pytest.raises(InputError, match="sft_kl needs a reference"):
        summarise(tokens, [qlens.get("sft_kl")])


def byte_level():
    letters_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters_)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback():
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257, "a": 258, "▁a": 259}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["byte-level", "byte-fallback"])
def test_the_texts_of_tokens_are_the_bytes_of_the_text(tokenizer):
    texts = TokenText(tokenizer)
    for text in ("a a", "a\na", "aé", "a😀!", "שלום", "\u202ea", "👨‍👩‍👧"):
        strings = [texts[token] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert "".join(strings).encode("utf-8", "surrogateescape").decode() == text
        assert "".join(completed(strings).values()) == "".join(letter for letter in text if not letter.isascii()), text


def test_special_and_unknown_tokens_have_names():
    texts = TokenText(letters())
    assert texts[0] == "<s>" and texts[999] == "<999>" and texts[3] == "\n"
    assert completed(["\udcf0", "a", "\udc9f"]) == {}
