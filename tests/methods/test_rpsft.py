"""The penalty of rpsft against its formula, and in training."""

import copy

import pytest
import torch
from tiny_models import llama, parameters, trainer_in
from torch import nn
from torch.testing import assert_close

import qlens


class Two(nn.Module):
    """Two matrices, one of which released code leaves free, and a vector."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.language = nn.Parameter(torch.randn(6, 4, generator=draw, dtype=torch.float64))
        self.vision = nn.Parameter(torch.randn(5, 5, generator=draw, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(4, generator=draw, dtype=torch.float64))


def perturbed(model, by=0.1):
    """The same model after a step in a fixed direction."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return model


@pytest.mark.parametrize("normalize", [False, True])
def test_value_and_gradient_match_the_paper(normalize):
    model = Two()
    start = model.language.detach().clone()
    variant = qlens.get("rpsft", weight=0.7, k=2, normalize=normalize)
    assert float(variant.penalty(model).detach()) < 1e-20
    perturbed(model)
    u, s, vh = torch.linalg.svd(start)
    u, v = u[:, :2], vh[:2].T
    block = u.T @ (model.language - start).detach() @ v
    size = s[:2].square().sum() if normalize else 1.0
    assert_close(variant.penalty(model).detach(), 0.7 * block.square().sum() / size)
    variant.penalty(model).backward()
    assert_close(model.language.grad, 2 * 0.7 * u @ block @ v.T / size)
    assert model.vision.grad is None and model.bias.grad is None


def test_a_full_rank_penalises_the_whole_matrix():
    model = Two()
    start, variant = model.language.detach().clone(), qlens.get("rpsft", k=4)
    variant.penalty(model)
    perturbed(model)
    assert_close(variant.penalty(model).detach(), (model.language - start).detach().square().sum())


def test_half_precision_is_near_and_not_equal():
    model = Two()
    variants = [qlens.get("rpsft", k=2, half=half) for half in (False, True)]
    for variant in variants:
        variant.penalty(model)
    perturbed(model)
    exact, half = (variant.penalty(model).item() for variant in variants)
    assert 0 < abs(exact - half) < 0.05 * exact


def test_what_is_not_trained_is_not_penalised():
    model = Two()
    variant = qlens.get("rpsft", k=2)
    variant.penalty(model)
    perturbed(model).language.requires_grad_(False)
    assert float(variant.penalty(model).detach()) == 0.0


def test_adapters_are_refused():
    model = nn.Module()
    model.lora_A = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(qlens.InputError, match="rpsft holds full weights.*lora_A"):
        qlens.get("rpsft").penalty(model)


def distance(model, start):
    """How far the leading directions of all matrices moved."""
    total = 0.0
    for (name, now), then in zip(model.named_parameters(), start.parameters(), strict=True):
        if now.ndim == 2 and "vision" not in name:
            u, _, vh = torch.linalg.svd(then.detach(), full_matrices=False)
            total += float((u[:, :4].T @ (now - then).detach() @ vh[:4].T).square().sum())
    return total


def test_the_penalty_keeps_training_near_the_leading_directions(tmp_path):
    start, ends = llama(), {}
    for spec in ("sft", "rpsft(weight=0.5, k=4)"):
        trainer = trainer_in(tmp_path, spec, model=copy.deepcopy(start), steps=8)
        trainer.train()
        ends[spec] = trainer.model
    unpenalised, penalised = (distance(model, start) for model in ends.values())
    assert penalised < 0.7 * unpenalised
    assert float((parameters(ends["sft"]) - parameters(start)).abs().max()) > 1e-3


def test_a_resumed_run_measures_from_the_first_start(tmp_path):
    start = llama()
    spec = "rpsft(weight=0.5, k=4)"
    trainer_in(tmp_path, spec, model=copy.deepcopy(start), steps=2, save_strategy="steps", save_steps=2).train()
    resumed = trainer_in(tmp_path, spec, model=copy.deepcopy(start), steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = 0.5 * distance(resumed.model, start)
    assert expected > 1e-6
    assert_close(float(resumed.variant.penalty(resumed.model).detach()), expected, rtol=1e-3, atol=0.0)


def test_a_comparison_trains_with_the_penalty(compare):
    study = compare(("sft", "rpsft(weight=10.0, k=4)"), seeds=1, steps=6)
    kl_start = study.diagnostics.set_index("method")["kl_start"]
    assert 0 < kl_start["rpsft(weight=10.0, k=4)"] < kl_start["sft"]
