"""QTrainer from hidden states against QTrainer from whole logits: methods of every kind, real heads, and the choice of path."""

import copy
import functools
import logging
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import case
from tiny import VOCAB, llama, parameters, rows, steps_of, trainer_in
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

import qlens
from qlens.data.collator import collate
from qlens.engine.fused import fusible
from qlens.engine.models.backbone import Backbone
from qlens.engine.models.forward import model_logits
from qlens.engine.models.head_capture import NoBackbone

MODELS = Path(__file__).resolve().parents[3] / "shared/data/models"
SHAPE = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=VOCAB,
)


@pytest.fixture
def make(tmp_path):
    """Trainers that write to a folder of their own."""
    return functools.partial(trainer_in, tmp_path)


def columns(examples: list[dict]) -> list[dict]:
    """Rows with every column a method may ask for, in whole pairs."""
    return [
        {
            **row,
            "critical": number % 3 > 0,
            "hint": number % 2 == 0,
            "chosen": number % 2 == 0,
            "pair": number // 2,
            "advantage": (-1.0) ** number * (0.5 + number / 8),
            "labels": row["input_ids"],
        }
        for number, row in enumerate(examples)
    ]


def step(make, variant, fused, model, examples=None, **others):
    """Loss and gradients of one batch."""
    trainer = make(variant, model=copy.deepcopy(model), examples=examples or columns(rows(8)), fused=fused, **others)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, collate(trainer.train_dataset))
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.model.parameters()]
    return loss.detach(), torch.cat([g.flatten() for g in grads])


def one_of_a_kind() -> list[str]:
    """A fusible method for every combination of structure, scope, inputs and denominator."""
    kinds = {}
    for name in qlens.names():
        variant = qlens.get(name)
        if fusible(variant):
            kinds.setdefault((str(variant.structure), variant.scope, variant.needs, variant.denominator), name)
    return list(kinds.values())


def test_a_fused_step_is_a_step_by_whole_logits(make):
    others = dict(teacher=llama(1).double(), reference=llama(2).double())
    for name in one_of_a_kind():
        with case(name):
            found = [step(make, name, fused, llama().double(), **others) for fused in (True, False)]
            assert found[0][1].norm() > 1e-6 or name == "psft" or found[1][1].norm() <= 1e-6
            assert_close(*found, rtol=1e-9, atol=1e-9)


def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0))


def granite():
    return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0))


def cohere():
    return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=1, n_head=2))


@pytest.mark.parametrize("build", [gemma2, granite, cohere, gpt2])
def test_heads_in_use(make, build):
    torch.manual_seed(3)
    model, teacher = build().double(), build().double()
    with torch.no_grad():
        for each in (model, teacher):
            each.get_output_embeddings().weight.mul_(20)
    for spec in ("dft", "target_sft", "dpo"):
        with case(spec):
            steps = [step(make, spec, fused, model, teacher=teacher, reference=teacher) for fused in (True, False)]
            assert_close(*steps, rtol=1e-8, atol=1e-8)
    backbone = Backbone(model, collate(rows(2)) | {"labels": None})
    expected = {"gemma2": (3.0, 1.0), "granite": (None, 0.25), "cohere": (None, 0.3), "gpt2": (None, 1.0)}
    assert (backbone.softcap, backbone.logit_scale) == expected[build.__name__]


def test_a_teacher_with_another_head_keeps_its_own(make):
    torch.manual_seed(0)
    found = [step(make, "kd", fused, llama().double(), teacher=gemma2_of(1)) for fused in (True, False)]
    assert_close(*found, rtol=1e-9, atol=1e-9)


def gemma2_of(seed: int):
    torch.manual_seed(seed)
    return gemma2().double()


class Shifted(LlamaForCausalLM):
    """Logits that are not its head's."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        outputs.logits = outputs.logits + torch.arange(outputs.logits.shape[-1]).to(outputs.logits)
        return outputs


class Headless(LlamaForCausalLM):
    """A head of two layers."""

    def get_output_embeddings(self):
        return nn.Sequential(self.lm_head)


@pytest.mark.parametrize(
    ("variant", "kind", "says"),
    [
        ("mile", LlamaForCausalLM, "for mile: it weighs tokens by a statistic of whole distributions"),
        (
            lambda logits, labels: F.cross_entropy(logits, labels),
            LlamaForCausalLM,
            "a loss of your own may look at all tokens",
        ),
        ("sft", Shifted, "of the model: its logits are not its head's: they differ by"),
        ("sft", Headless, "of the model: it has no plain linear head: its output embedding is a Sequential"),
    ],
    ids=["batch statistic", "own loss", "bent logits", "no linear head"],
)
def test_where_logits_are_whole_a_line_says_why_once(make, caplog, variant, kind, says):
    model = kind(llama().config)
    with caplog.at_level(logging.WARNING, "qlens"):
        make(variant, model=model, steps=2).train()
    lines = [line for line in caplog.messages if line.startswith("qlens holds whole logits")]
    assert len(lines) == 1 and says in lines[0]
    with pytest.raises(NoBackbone, match="fused=True, but there are only whole logits"):
        make(variant, model=model, fused=True).train()
    caplog.clear()
    make(variant, model=model, fused=False).train()
    assert not [line for line in caplog.messages if line.startswith("qlens holds whole logits")]


def test_the_head_makes_no_logits_of_a_batch(make):
    widths = []
    trainer = make("target_sft", teacher=llama(1), steps=2, batch=8)
    for model in (trainer.model, trainer._method_inputs.other_models["teacher"]):
        model.lm_head.register_forward_hook(lambda module, args, out: widths.append(tuple(out.shape)))
    trainer.train()
    whole = [shape for shape in widths if shape[-1] == VOCAB]
    assert whole and all(shape[0] == 1 and shape[1] <= 16 for shape in whole)  # proofs on a few tokens, once per model
    assert len(whole) <= 12 and len(widths) > len(whole)


def test_a_frozen_head_gets_no_gradient(make):
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    trainer = make("dft", model=model, fused=True, steps=1)
    trainer.train()
    assert trainer.model.lm_head.weight.grad is None
    assert_close(trainer.model.lm_head.weight, llama().lm_head.weight, rtol=0, atol=0)
    assert float((parameters(trainer.model) - parameters(llama())).norm()) > 1e-4


def test_evaluation_keeps_logits_only_for_those_who_ask(make):
    losses = []
    for fused, compute_metrics in ((True, None), (False, None), (None, lambda found: {"rows": len(found.predictions)})):
        trainer = make("dft", eval_dataset=rows(5), fused=fused, compute_metrics=compute_metrics)
        metrics = trainer.evaluate()
        losses.append(torch.tensor([metrics["eval_loss"], metrics["eval_nll"], metrics["eval_kl_target"]]))
    assert metrics["eval_rows"] == 5
    for other in losses[1:]:
        assert_close(losses[0], other, rtol=1e-5, atol=1e-6)


class Sizes(TorchDispatchMode):
    """Counts the matrix products with a head, and finds the largest new tensor."""

    def __init__(self, head):
        super().__init__()
        self.head, self.products, self.largest = head.numel(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        product = func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        self.products += product and any(each.numel() == self.head for each in args)
        if isinstance(result, torch.Tensor) and func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.zeros):
            self.largest = max(self.largest, result.numel())
        return result


def test_without_gradient_the_logits_are_the_only_product_with_the_head():
    for spec in ("sft", "label_smoothing", "kd", "gem", "iw_sft"):
        with case(spec):
            assert_one_product(spec)


def assert_one_product(spec):
    torch.manual_seed(0)
    hidden, head = torch.randn(6, 50, requires_grad=True), torch.randn(40, 50, requires_grad=True)
    given = {"labels": torch.arange(6), "sequence": torch.tensor([0, 0, 1, 1, 2, 2])}
    given |= {name: torch.randn(6, 40) for name in qlens.get(spec).needs if name != "sequence"}
    value = qlens.fused_loss(spec, hidden, head, **given).detach()
    with torch.no_grad(), Sizes(head) as sizes:
        alone = qlens.fused_loss(spec, hidden, head, **given)
    assert_close(alone, value, rtol=0, atol=0)
    assert sizes.products <= (2 if spec == "iw_sft" else 1)  # iw_sft weighs whole sequences: a first pass over them
    assert sizes.largest < head.numel()


def test_threads_that_share_a_model_get_what_each_asked_for(make):
    teacher, batch = llama(1).eval(), collate(rows(4))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    backbones = [Backbone(teacher, inputs) for _ in range(2)]
    logits, hidden = model_logits(teacher, inputs), backbones[0].hidden(inputs).detach()
    wrong = []

    def differs(read, expected):
        for _ in range(40):
            with torch.no_grad():
                if not torch.equal(read(), expected):
                    wrong.append(read)

    jobs = [(lambda backbone=backbone: backbone.hidden(inputs), hidden) for backbone in backbones]
    jobs += [(lambda: model_logits(teacher, inputs), logits)]
    threads = [threading.Thread(target=differs, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and "forward" not in teacher.lm_head.__dict__


def test_metrics_come_out_of_the_same_pass_and_can_be_thinned(make):
    logs = {}
    for fused in (True, False):
        trainer = make("kd_hybrid", teacher=llama(1), steps=4, fused=fused, log_every=2)
        trainer.train()
        logs[fused] = steps_of(trainer)
    assert ["nll" in entry for entry in logs[True]] == [True, False, True, False]
    for mine, theirs in zip(logs[True], logs[False], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    trainer = make("sft", steps=2, log_every=0)
    trainer.train()
    assert not any("nll" in entry for entry in steps_of(trainer))
    with pytest.raises(qlens.InputError, match="log_every must be a whole number of at least 0"):
        make("sft", log_every=-1)


def test_a_loss_alone_of_declared_scope_is_trained_a_few_rows_at_a_time(make, caplog):
    def gated(tokens):
        rank = (tokens.log_probs.detach() > tokens.label_log_probs.detach()[:, None]).sum(-1)
        return -tokens.label_log_probs * (rank < VOCAB // 2) + 0.01 * tokens.logits.logsumexp(-1).square()

    weights = []
    for fused in (None, False):
        variant = qlens.registry.Method(name="gated", fn=gated, scope="token").variant()
        with caplog.at_level(logging.WARNING, "qlens"):
            trainer = make(variant, steps=3, fused=fused)
            trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert not caplog.messages
    assert_close(*weights, rtol=1e-4, atol=1e-6)
