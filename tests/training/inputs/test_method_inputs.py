"""Inputs of a method that QTrainer provides: old policy, second pass, negatives, columns of the data, selected tokens."""

import copy

import pytest
import torch
from tiny_models import VOCAB, Recorder, llama, parameters, rows
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import qlens
from qlens.core.errors import InputError
from qlens.core.supervised import Supervised
from qlens.core.tokens import Tokens
from qlens.data.collator import COLUMNS, collate


@pytest.fixture
def spy_method():
    """A loss that remembers the tokens it was trained on, for the fields a test asks of it."""

    def spying(*needs):
        def spy(tokens):
            if tokens.logits.grad_fn is not None:  # not the probes that tell what kind of loss it is
                spy.tokens.append(tokens)
            return -tokens.label_log_probs

        spy.tokens = []
        method = qlens.registry.Method(name="spy", fn=spy, needs=needs)
        return method.variant(), spy.tokens

    return spying


def test_the_old_policy_is_the_student_at_the_last_sync(make, spy_method):
    variant, tokens = spy_method("old")
    trainer = make(variant, old_every=2, steps=5, fused=False)
    trainer.train()
    differs = [bool((each.logits - each.old).abs().max() > 1e-6) for each in tokens]
    assert differs == [False, True, False, True, False]
    assert not any(each.old.requires_grad for each in tokens)


def test_psft_is_sft_while_the_old_policy_is_the_student(make):
    trainers = [make("sft", steps=3), make("psft", old_every=1, steps=3)]
    for trainer in trainers:
        trainer.train()
    assert_close(parameters(trainers[0].model), parameters(trainers[1].model), atol=1e-6, rtol=1e-6)
    stale = make("psft", old_every=100, steps=3)
    stale.train()
    assert float((parameters(stale.model) - parameters(trainers[0].model)).abs().max()) > 1e-5


def test_the_second_pass_has_its_own_dropout_and_no_gradient(make, spy_method):
    shape = dict(n_positions=32, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.3, embd_pdrop=0.3)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **shape))
    variant, tokens = spy_method("second")
    make(variant, model=model, steps=1, fused=False).train()
    first = tokens[0]
    assert not first.second.requires_grad and float((first.logits - first.second).detach().abs().max()) > 1e-3


def test_negatives_are_the_tokens_before_a_label_in_its_own_text(make, spy_method):
    variant, tokens = spy_method("negatives")
    recorder = Recorder()
    make(variant, steps=1, data_collator=recorder, fused=False).train()
    expected = []
    for ids, mask, labels in zip(
        *(recorder.batches[0][n] for n in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        for t in range(1, int(mask.sum())):
            if labels[t] != -100:
                earlier = set(ids[:t].tolist()) - {int(labels[t])}
                expected.append([entry in earlier for entry in range(VOCAB)])
    assert torch.equal(tokens[0].negatives, torch.tensor(expected))


def test_context_ends_where_a_packed_sequence_begins():
    ids = torch.tensor([[5, 6, 7, 3, 4, 5]])
    packed = Supervised(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    contexts = [set(row.nonzero()[:, 0].tolist()) for row in packed.context(ids, 8)]
    assert contexts == [{5}, {5, 6}, {3}, {3, 4}]


def test_data_columns_are_aligned_with_labels(make, spy_method):
    variant, tokens = spy_method("critical", "advantage")
    examples = [row | {"critical": [token % 2 for token in row["input_ids"]], "advantage": 0.5} for row in rows(4)]
    make(variant, examples=examples, steps=1, fused=False).train()
    assert torch.equal(tokens[0].critical, tokens[0].labels % 2 == 1)
    assert_close(tokens[0].advantage, torch.full_like(tokens[0].advantage, 0.5))


def test_a_weight_column_applies_to_any_method(make):
    doubled = [row | {"weight": 2.0} for row in rows(8)]
    heavy, plain = make("dft", examples=doubled, steps=1), make("dft", steps=1)
    start = parameters(plain.model).clone()
    for trainer in (heavy, plain):
        trainer.train()
    assert_close(parameters(heavy.model) - start, 2 * (parameters(plain.model) - start), atol=1e-6, rtol=1e-4)


def test_columns_that_do_not_fit_are_refused(make):
    with pytest.raises(InputError, match="cft needs 'critical': give the data a column of that name"):
        make("cft", steps=1).train()
    wrong = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "critical": [True]}]
    with pytest.raises(InputError, match="'critical' must hold one value, or one per token.* has 1 values for 3"):
        collate(wrong)
    with pytest.raises(InputError, match="lacks it"):
        collate([*wrong, {"input_ids": [1], "labels": [1]}][::-1])
    assert set(COLUMNS) < set(Tokens.__dataclass_fields__)


def test_a_selected_mean_divides_by_the_selected_tokens(make):
    model = llama()
    recorder = Recorder()
    trainer = make("cft", model=copy.deepcopy(model), data_collator=recorder, steps=1, examples=[
        row | {"critical": [at % 3 == 0 for at in range(len(row["input_ids"]))]} for row in rows(4)
    ])  # fmt: skip
    trainer.train()
    batch = recorder.batches[0]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    selected = (batch["labels"][:, 1:] != -100) & batch["critical"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[selected], batch["labels"][:, 1:][selected])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.cat([(p - 0.1 * g).detach().flatten() for p, g in zip(model.parameters(), gradients, strict=True)])
    assert_close(parameters(trainer.model), expected, atol=1e-6, rtol=1e-5)


def test_a_model_built_by_model_init_is_the_student(make):
    ends = []
    for spec in ("sft", "r_drop"):  # without dropout the second pass is the first, if it is the same model's
        args = make(spec, steps=3).args
        trainer = qlens.QTrainer(model_init=lambda: llama(), args=args, variant=spec, train_dataset=rows(8))
        trainer.train()
        ends.append(parameters(trainer.model))
    assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)
    assert float((ends[0] - parameters(llama())).norm()) > 1e-3
