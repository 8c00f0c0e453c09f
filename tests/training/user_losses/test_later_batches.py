"""Methods that change on later batches: detected at the first batch, or when their state has changed."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import llama, rows, trainer_in
from transformers import TrainerCallback, TrainerState
from user_methods import user_method

import qlens
from qlens.core.errors import InputError
from qlens.engine.fused import fused_loss
from qlens.engine.verification.fingerprints import fingerprint

V = 300
STATE = {"step": 0}


class Schedule:
    """A class whose attribute is a schedule's."""

    step = 0


def weak(n=60, seed=0, scale=0.05):
    """Hidden states, a head and labels on which the student knows nothing yet."""
    draw = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(n, 16, generator=draw, dtype=torch.float64)
    head = torch.randn(V, 16, generator=draw, dtype=torch.float64)
    return hidden.requires_grad_(), head.requires_grad_(), torch.randint(V, (n,), generator=draw)


def by_dict():
    return STATE["step"]


def by_class():
    return Schedule.step


def by_trainer(trainer):
    return lambda: trainer.state.global_step


class Owner:
    def __init__(self):
        self.state = TrainerState()


def set_all(step, owner):
    STATE["step"] = Schedule.step = owner.state.global_step = step


def test_a_schedule_that_starts_to_compare_rows_is_verified_again():
    owner = Owner()
    for number, step in enumerate((by_dict, by_class, by_trainer(owner))):
        set_all(0, owner)

        def target(tokens, step=step):
            p = tokens.label_probs.detach()
            return qlens.Target.push(tokens, torch.ones_like(p) if step() < 1 else (p >= p.median()).to(p))

        variant = user_method(target, name=f"curriculum_{number}")
        hidden, head, labels = weak()
        logits = hidden @ head.T
        nll = F.cross_entropy(logits, labels, reduction="none")
        p = (-nll).exp().detach()
        for now, keep in ((0, torch.ones_like(p)), (1, (p >= p.median()).to(p)), (2, (p >= p.median()).to(p))):
            set_all(now, owner)
            expected_value = (keep * nll).mean()
            got = fused_loss(variant, hidden, head, labels, chunk=10)
            expected = torch.autograd.grad(expected_value, (hidden, head), retain_graph=True)
            for a, b in zip(torch.autograd.grad(got, (hidden, head)), expected, strict=True):
                torch.testing.assert_close(a, b)


def test_fingerprints_change_with_what_a_function_reads():
    owner, unused = Owner(), {"x": 0}
    for function in (by_dict, by_class, by_trainer(owner)):
        set_all(0, owner)
        before = fingerprint([function])
        unused["x"] += 1
        assert fingerprint([function]) == before
        set_all(1, owner)
        assert fingerprint([function]) != before


def test_a_wrong_structure_is_refused_in_a_later_batch():
    def gated(tokens):
        top = tokens.logits.argmax(-1) == tokens.labels
        return qlens.Target.push(tokens, torch.where(top, 0.2, 1.0).to(tokens.logits))

    def gated_loss(tokens):
        top = tokens.logits.argmax(-1) == tokens.labels
        return -torch.where(top, 0.2, 1.0) * tokens.label_log_probs

    hidden, head, labels = weak()
    assert not bool(((hidden @ head.T).argmax(-1) == labels).any())
    with pytest.raises(InputError, match="declares structure='label', but has another loss or gradient"):
        fused_loss(user_method(gated, gated_loss, structure="label", scope="token"), hidden, head, labels)


def test_a_target_that_differs_only_at_likely_labels_is_refused():
    def clamped(tokens):
        return qlens.Target.push(tokens, (1 - tokens.label_probs).clamp(min=0.5))

    def clamped_loss(tokens):
        return -(1 - tokens.label_probs.detach()) * tokens.label_log_probs

    with pytest.raises(InputError, match="the gradient of its printed loss and s .* of its target differ"):
        fused_loss(user_method(clamped, clamped_loss, scope="token"), *weak())


def test_callback_schedules_match_the_plain_path(tmp_path):
    def scheduled(tokens):
        p = tokens.label_probs.detach()
        return qlens.Target.push(tokens, p if STATE["step"] else torch.ones_like(p))

    def printed(tokens):
        p = tokens.label_probs.detach()
        return -(p if STATE["step"] else torch.ones_like(p)) * tokens.label_log_probs

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            STATE["step"] = state.global_step

    variant, ends = user_method(scheduled, printed, structure="label", scope="token"), []
    for fused in (None, False):
        STATE["step"], model = 0, llama()
        trainer = trainer_in(tmp_path, variant, model=model, examples=rows(8), fused=fused, steps=3)
        trainer.add_callback(Steps())
        trainer.train()
        ends.append(torch.cat([value.detach().flatten() for value in model.parameters()]))
    torch.testing.assert_close(*ends)
