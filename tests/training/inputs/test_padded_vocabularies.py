"""Teachers whose vocabulary is padded to another size: cut and renormalised or filled up, with one log line."""

import logging

import pytest
import torch
from cases import case
from tiny_models import CHARACTERS, VOCAB, letters, llama, parameters
from torch.testing import assert_close

import qlens
from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.data.from_text import tokens_from_text
from qlens.data.models import loaded_once
from qlens.data.vocabularies import Vocabularies
from qlens.engine.heads import Head, fitted

METHODS = ("kd", "reverse_kl", "target_sft", "jsd", "topk_kd", "sft_kl")


def padded(size, seed=1):
    """A teacher of another width whose common entries are those of ``llama(seed)``."""
    teacher, plain = llama(seed, vocab=size), llama(seed)
    common, values = (
        min(size, VOCAB),
        {n: p for n, p in plain.named_parameters() if "embed" not in n and "head" not in n},
    )
    with torch.no_grad():
        for name, value in values.items():
            teacher.get_parameter(name).copy_(value)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            teacher.get_parameter(name)[:common] = plain.get_parameter(name)[:common]
    return teacher


def test_a_wider_teacher_is_cut_and_renormalised(make, caplog):
    for spec in METHODS:
        ends = []
        for other in (llama(1), padded(40)):
            for fused in (True, False):
                with case(f"{spec}, fused={fused}"), caplog.at_level(logging.WARNING, "qlens"):
                    caplog.clear()
                    name = "reference" if spec == "sft_kl" else "teacher"
                    trainer = make(spec, fused=fused, steps=2, **{name: other})
                    trainer.train()
                    ends.append(parameters(trainer.model))
                    lines = [text for text in caplog.messages if "vocabulary" in text]
                    assert len(lines) == (other.config.vocab_size == 40)
                    assert all(
                        f"{name} has a vocabulary of 40, the model of 32: cut to the common 32" in t for t in lines
                    )
        for end in ends[1:]:
            assert_close(end, ends[0], rtol=1e-4, atol=1e-6)


def test_the_mass_that_is_dropped_is_logged(make, caplog):
    logits = torch.zeros(3, 4)
    logits[:, 3] = torch.tensor([0.0, torch.log(torch.tensor(3.0)), -200.0])
    with caplog.at_level(logging.WARNING, "qlens"):
        Vocabularies().fitted(logits, 3, "teacher")
    assert "the mass that is dropped with the others is 0.25 on average and 0.5 at most (3 tokens)" in caplog.text
    assert_close(fitted(logits, 3), logits[:, :3])


def test_a_narrower_teacher_has_probability_0_where_it_has_no_entry(make, caplog):
    teacher, student = llama(1), llama(0, vocab=40)
    for spec in METHODS[:-1]:
        losses, gradients = [], []
        for fused in (True, False):
            with case(f"{spec}, fused={fused}"), caplog.at_level(logging.WARNING, "qlens"):
                trainer = make(spec, model=student, teacher=teacher, fused=fused)
                student.zero_grad()
                loss = trainer.compute_loss(student, next(iter(trainer.get_train_dataloader())))
                loss.backward()
                losses.append(loss.detach()), gradients.append(student.lm_head.weight.grad.clone())
                assert torch.isfinite(loss) and torch.isfinite(gradients[-1]).all()
        assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5), assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert (
        "teacher has a vocabulary of 32, the model of 40: the 8 entries that teacher lacks have probability 0"
        in caplog.text
    )
    logits = fitted(torch.tensor([[50.0, -1e4, 0.0]]), 5)
    assert float(logits.softmax(-1)[0, 3:].sum()) == 0 and bool(logits.log_softmax(-1)[0, 3:].isfinite().all())
    tokens = Tokens(logits=torch.zeros(1, 5), labels=torch.tensor([0]), teacher=logits)
    assert_close(qlens.get("kd").target(tokens).q[0, 3:], torch.zeros(2))
    assert bool(qlens.get("reverse_kl").loss(tokens).isfinite().all())


def test_the_lens_reads_padded_teachers(caplog):
    texts = ["what is banana", "say it again"]
    for teacher in (padded(40), padded(36)):
        with caplog.at_level(logging.WARNING, "qlens"):
            caplog.clear()
            tokens = tokens_from_text(llama(), letters(), texts, teacher=teacher)
        expected = tokens_from_text(llama(), letters(), texts, teacher=llama(1))
        assert_close(tokens.teacher, expected.teacher, rtol=1e-4, atol=1e-4)
        assert sum("vocabulary" in text for text in caplog.messages) == 1
        assert "Q" in str(qlens.explain("target_sft", tokens))
    narrow = tokens_from_text(llama(vocab=40), letters(), texts, teacher=llama(1))
    assert narrow.teacher.shape == narrow.logits.shape and float(narrow.teacher.softmax(-1)[:, 32:].sum()) == 0
    view = qlens.view(llama(), letters(), [{"text": text} for text in texts], ["kd"], teacher=padded(40))
    assert "kd" in view._repr_html_()


def test_one_model_as_teacher_and_reference_is_read_once(tmp_path):
    teacher, calls = llama(1), []
    teacher.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    tokens_from_text(llama(), letters(), ["what is it"], teacher=teacher)  # which also looks whether it is causal
    counts = []
    for reference in (None, teacher):
        calls.clear()
        both = tokens_from_text(llama(), letters(), ["what is it"], teacher=teacher, reference=reference)
        counts.append(len(calls))
    assert counts == [1, 1]
    assert_close(both.reference, both.teacher)
    teacher.save_pretrained(tmp_path)
    opened = loaded_once({"teacher": tmp_path, "reference": str(tmp_path), "none": None})
    assert opened["teacher"] is opened["reference"] and set(opened) == {"teacher", "reference"}


def test_watch_reads_padded_teachers(make, caplog):
    watches = []
    for teacher in (llama(1), padded(40)):
        watch = qlens.Watch("kd", [{"text": "what is it"}], tokenizer=letters(), teacher=teacher, every=1)
        with caplog.at_level(logging.WARNING, "qlens"):
            make("sft", callbacks=[watch], steps=2).train()
        watches.append(watch.frame.drop(columns="text"))
    assert sum("vocabulary" in text for text in caplog.messages) == 1
    for name in ("kl", "entropy", "label_weight"):
        assert list(watches[0][name]) == pytest.approx(list(watches[1][name]), rel=1e-4, abs=1e-6)


def test_other_tokenizers_are_refused_with_the_difference(make, tmp_path):
    folders = {"same": letters(), "other": letters(order=[*CHARACTERS, "é"])}
    for name, tokenizer in folders.items():
        padded(40).save_pretrained(tmp_path / name), tokenizer.save_pretrained(tmp_path / name)
    make("kd", teacher=tmp_path / "same", processing_class=letters())
    for teacher in (tmp_path / "other", str(tmp_path / "other")):
        with pytest.raises(
            InputError, match="teacher is over another vocabulary than the model: the tokenizers have 32 and 33"
        ):
            make("kd", teacher=teacher, processing_class=letters())
    with pytest.raises(InputError, match="their tokenizer has a token 31: they differ by more than padding"):
        make("kd", teacher=llama(1, vocab=30), processing_class=letters())
    with pytest.raises(InputError, match="more than padding, and no tokenizer is at hand"):
        make("kd", teacher=llama(1, vocab=32 + 1025))
    make("kd", teacher=llama(1, vocab=32 + 1024))


def test_the_engine_names_the_way_to_fit_a_head():
    hidden, head, labels = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 2])
    with pytest.raises(
        InputError, match=r"teacher has a vocabulary of 7.*give teacher=Head\(hidden, weight\).fitted\(5\)"
    ):
        qlens.fused_loss("kd", hidden, head, labels, teacher=(hidden, torch.randn(7, 4)))
    wide = torch.cat([head, torch.randn(2, 4)])
    values = [
        qlens.fused_loss("kd", hidden, head, labels, teacher=t) for t in ((hidden, head), Head(hidden, wide).fitted(5))
    ]
    assert_close(values[0], values[1])
