"""Losses of pairs are divided by the number of pairs in the engine, in training and in evaluation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import case
from tiny_models import llama, parameters, rows, steps_of
from torch.testing import assert_close

import qlens
from qlens.core.errors import InputError
from qlens.core.supervised import Supervised
from qlens.core.tokens import Tokens
from qlens.data.collator import collate


def in_pairs(count: int, first: int = 0) -> list[dict]:
    """Rows that are the chosen and the rejected text of pairs, in turn."""
    return [
        {**row, "labels": row["input_ids"], "chosen": at % 2 == 0, "pair": first + at // 2}
        for at, row in enumerate(rows(count, seed=first))
    ]


def dpo_by_hand(model, reference, examples, beta=0.1) -> torch.Tensor:
    """-log sigmoid(beta margin) of every pair, as its paper and TRL have it: the mean over pairs."""
    ratios = []
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        log_p, log_r = (
            -F.cross_entropy(m(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum") for m in (model, reference)
        )
        ratios.append(log_p - log_r.detach())
    return torch.stack([-F.logsigmoid(beta * (c - r)) for c, r in zip(ratios[::2], ratios[1::2], strict=True)])


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "whole logits"])
def test_a_step_is_the_mean_over_its_pairs_however_it_is_cut(make, fused):
    model, reference, examples = llama(), llama(2), in_pairs(8)
    loss = dpo_by_hand(model, reference, examples).mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.cat([(p - 0.1 * g).detach().flatten() for p, g in zip(model.parameters(), grads, strict=True)])
    packs = [joined(examples[at : at + 2]) for at in range(0, 8, 2)]
    for data, batch, accumulate in ((examples, 8, 1), (packs, 2, 2), (packs, 1, 4)):
        trainer = make(
            "dpo", model=copy.deepcopy(model), reference=reference, examples=data, batch=batch, accumulate=accumulate, steps=1,
            fused=fused,
        )  # fmt: skip
        trainer.train()
        assert steps_of(trainer)[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert_close(parameters(trainer.model), expected, rtol=1e-4, atol=1e-6)


def joined(examples: list[dict]) -> dict:
    """Both texts of a pair in one packed example."""
    sizes = [len(example["input_ids"]) for example in examples]
    ids = [token for example in examples for token in example["input_ids"]]
    per_token = {
        name: [example[name] for example, size in zip(examples, sizes, strict=True) for _ in range(size)]
        for name in ("chosen", "pair")
    }
    return {"input_ids": ids, "labels": ids, "seq_lengths": sizes, **per_token}


def test_engine_and_trainer_use_one_denominator(make):
    for spec in ("dpo", "simpo", "ipo", "orpo"):
        with case(spec):
            assert_one_denominator(make, spec)


def assert_one_denominator(make, spec):
    model, reference, examples = llama(), llama(2), in_pairs(6)
    batch = collate(examples)
    where = Supervised.of(batch)
    logits, reference_logits = (where.take(m(input_ids=batch["input_ids"]).logits).detach() for m in (model, reference))
    fields = {
        "pair": where.at_labels(batch["pair"]),
        "chosen": where.at_labels(batch["chosen"]),
        "sequence": where.sequence,
    }
    tokens = Tokens(logits=logits, labels=where.labels, reference=reference_logits, **fields)
    expected = float(qlens.get(spec).loss(tokens).sum() / 3)
    engine = qlens.fused_loss(
        spec, logits, torch.eye(logits.shape[1]), where.labels, reference=reference_logits, **fields
    )
    assert float(engine) == pytest.approx(expected, rel=1e-4)
    for fused in (None, False):
        trainer = make(spec, model=model, reference=reference, examples=examples, fused=fused)
        assert trainer.compute_loss(model, batch).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "whole logits"])
def test_evaluation_is_the_mean_over_the_pairs_of_the_set(make, fused):
    model, reference = llama(), llama(2)
    examples = [*in_pairs(4), *in_pairs(2, first=7), *in_pairs(4, first=20)]
    expected = dpo_by_hand(model, reference, examples).mean().item()
    nll = []
    for batch in (2, 10):
        trainer = make(
            "dpo",
            model=model,
            reference=reference,
            eval_dataset=examples,
            per_device_eval_batch_size=batch,
            fused=fused,
        )
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
        nll.append(metrics["eval_nll"])  # a mean over tokens as for any method
    assert nll[0] == pytest.approx(nll[1], rel=1e-5)
    assert nll[0] == pytest.approx(make("sft", model=model, eval_dataset=examples).evaluate()["eval_nll"], rel=1e-4)


def test_half_a_pair_is_refused_with_what_to_do(make):
    trainer = make("dpo", reference=llama(2), examples=in_pairs(8), batch=1, accumulate=2)
    with pytest.raises(InputError, match="pair .* within one micro-batch .pack its two texts into one example"):
        trainer.train()
    with pytest.raises(InputError, match="simpo needs 'pair': give the data a column of that name"):
        make("simpo").train()


def test_a_method_of_pairs_needs_their_ids():
    method = qlens.registry.Method(
        name="mine", fn=lambda tokens: -tokens.label_log_probs, scope="pair", structure="label"
    )
    with pytest.raises(InputError, match=r"mine needs a pair: give fused_loss\(pair=...\)"):
        qlens.fused_loss(method.variant(), torch.randn(4, 8), torch.randn(9, 8), torch.arange(4))
