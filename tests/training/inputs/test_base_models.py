"""Other models that share parameters with the student, and the reference of a model with adapters."""

import copy
from contextlib import contextmanager

import pytest
import torch
from tiny_models import llama, parameters, rows
from torch import nn
from torch.testing import assert_close

from qlens.core.errors import InputError
from qlens.data.base_models import WithoutAdapters


class Adapted(nn.Linear):
    """A linear layer with a term of low rank, as LoRA adds it."""

    on = True

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.low = nn.Parameter(0.5 * torch.randn(2, base.in_features))
        self.high = nn.Parameter(0.5 * torch.randn(base.out_features, 2))

    def forward(self, x):
        return super().forward(x) + (x @ self.low.T @ self.high.T if self.on else 0)


class WithAdapters(nn.Module):
    """A model with adapters, with the methods of peft's that QTrainer looks at."""

    def __init__(self, base):
        super().__init__()
        self.base, self.config = base.requires_grad_(False), base.config
        torch.manual_seed(5)
        attention = base.model.layers[0].self_attn
        attention.v_proj = Adapted(attention.v_proj)
        attention.v_proj.weight.requires_grad_(False)

    def get_base_model(self):
        return self.base

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    @contextmanager
    def disable_adapter(self):
        adapter = self.base.model.layers[0].self_attn.v_proj
        adapter.on = False
        for value in (adapter.low, adapter.high):
            value.requires_grad_(False)  # as peft's does
        try:
            yield
        finally:
            adapter.on = True
            adapter.low.requires_grad_(True), adapter.high.requires_grad_(True)

    def forward(self, input_ids=None, attention_mask=None, **features):
        return self.base(input_ids=input_ids, attention_mask=attention_mask, **features)


def adapted():
    return WithAdapters(llama())


def test_the_reference_of_a_model_with_adapters_is_the_model_without_them(make):
    for spec in ("sft_kl(weight=0.5)", "dpo"):
        examples = rows(8)
        if spec == "dpo":
            examples = [
                {**row, "labels": row["input_ids"], "chosen": at % 2 == 0, "pair": at // 2}
                for at, row in enumerate(examples)
            ]
        ends = []
        for reference in (None, llama()):
            for fused in (True, False):
                trainer = make(
                    spec, model=adapted(), examples=examples, reference=reference, fused=fused, steps=3, batch=8
                )
                start = parameters(trainer.model)
                trainer.train()
                ends.append(parameters(trainer.model) - start)
                assert trainer.model.training and trainer.model.base.model.layers[0].self_attn.v_proj.low.requires_grad
        for other in ends[1:]:
            assert ends[0].norm() > 1e-3
            assert_close(ends[0], other, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft with newer transformers
def test_a_peft_lora_model_has_its_base_as_reference(make):
    peft = pytest.importorskip("peft")

    def lora(base):
        torch.manual_seed(3)
        shape = dict(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM", init_lora_weights=False)
        return peft.get_peft_model(base, peft.LoraConfig(**shape))

    ends = []
    for reference in (None, llama()):
        trainer = make("sft_kl(weight=0.5)", model=lora(llama()), reference=reference, fused=True, steps=3)
        start = parameters(trainer.model)
        trainer.train()
        ends.append(parameters(trainer.model) - start)
    assert ends[0].norm() > 1e-3
    assert_close(*ends, rtol=1e-4, atol=1e-6)
    base = llama()
    with pytest.raises(InputError, match="leave reference out"):
        make("sft_kl", model=lora(base), reference=base)


def test_the_adapter_reference_leaves_the_model_unchanged():
    model = adapted()
    frozen = copy.deepcopy(model).requires_grad_(False)
    features = {"input_ids": torch.tensor([[1, 2, 3]])}
    for each in (model, frozen):
        expected = [value.requires_grad for value in each.parameters()]
        logits = WithoutAdapters(each)(**features).logits
        assert_close(logits, llama()(**features).logits, rtol=0, atol=0)
        assert [value.requires_grad for value in each.parameters()] == expected and each.training
        assert not list(WithoutAdapters(each).parameters())


def test_another_model_that_shares_trained_parameters_is_refused_and_nothing_is_frozen(make):
    student, teacher = llama(), llama(3)
    teacher.lm_head = student.lm_head
    with pytest.raises(InputError, match=r"teacher shares 1 parameters with the model being trained, lm_head.weight"):
        make("kd", model=student, teacher=teacher)
    assert all(value.requires_grad for value in student.parameters())
    viewed = llama(3)
    viewed.lm_head.weight = nn.Parameter(student.lm_head.weight.data, requires_grad=False)  # the same memory
    with pytest.raises(InputError, match=r"lm_head.weight among them.*copy.deepcopy"):
        make("kd", model=student, teacher=viewed)
    model = adapted()
    with pytest.raises(InputError, match=r"low among them.*leave reference out \(it is then the model without"):
        make("sft_kl", model=model, reference=model.get_base_model())
    with pytest.raises(
        InputError, match=r"teacher shares 2 parameters.*the base model beneath adapters holds them too"
    ):
        make("kd", model=model, teacher=model.get_base_model())
    student.lm_head.requires_grad_(False)  # what is trained by nobody may be shared
    trainer = make("kd", model=student, teacher=teacher, steps=1)
    trainer.train()
    assert float((parameters(trainer.model) - parameters(llama())).norm()) > 1e-4


def test_a_model_without_adapters_still_needs_a_reference(make):
    with pytest.raises(InputError, match=r"sft_kl needs a reference: give QTrainer\(reference=...\)"):
        make("sft_kl")
