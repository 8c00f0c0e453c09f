"""User methods, many of which equal a built-in one at a small vocabulary, and their comparison with autograd."""

import itertools
import random

import torch
from torch.testing import assert_close

from qlens import Target, Tokens, fused_loss
from qlens.core.numerics import log_softmax
from qlens.registry import Method


def user_method(target=None, loss=None, name="mine", **card):
    """A method as a user registers it, without a place in the registry."""
    method = Method(name=name, fn=target or loss, **card)
    method.printed = loss if target else None
    return method.variant()


def rank_gate(tokens):
    """1 where the label is among the sixty most probable entries."""
    return ((tokens.log_probs.detach() > tokens.label_log_probs.detach()[:, None]).sum(-1) < 60).to(tokens.logits.dtype)


def entropy_gate(tokens):
    """1 where the entropy is below 4 nats, above the logarithm of any small vocabulary."""
    log_p = tokens.log_probs.detach()
    return (-(log_p.exp() * log_p).sum(-1) < 4.0).to(tokens.logits.dtype)


def mass_gate(tokens):
    """The student's mass on its forty most probable entries."""
    p = tokens.probs.detach()
    return p.topk(min(40, p.shape[1]), -1).values.sum(-1)


def margin_gate(tokens):
    """1 where the label's logit is at most 6 nats below the highest."""
    z = tokens.log_probs.detach()
    return (z.amax(-1) - tokens.gather(z) < 6.0).to(z.dtype)


def threshold_gate(tokens):
    """A floor under the label's probability."""
    return tokens.label_probs.detach().clamp(min=1e-4)


def everywhere(tokens):
    """1 on every token."""
    return torch.ones_like(tokens.label_probs.detach())


def student(tokens):
    """What the label does not get stays with the student."""
    return tokens.probs.detach()


def uniform(tokens):
    """All entries alike."""
    return torch.full_like(tokens.probs, 1 / tokens.logits.shape[1])


def teacher_top(tokens):
    """The teacher's forty most probable entries, renormalised."""
    log_t = tokens.log_probs_of("teacher")
    top = log_t.topk(min(40, log_t.shape[1]), -1)
    return log_softmax(torch.full_like(log_t, -torch.inf).scatter(1, top.indices, top.values)).exp()


def teacher_whole(tokens):
    """The teacher."""
    return tokens.log_probs_of("teacher").exp()


GATES = (rank_gate, entropy_gate, mass_gate, margin_gate, threshold_gate, everywhere)
RESIDUALS = (student, uniform, teacher_top, teacher_whole)
FORMS = ("target", "loss", "both", "rows of logits")


def combination(gates, residual, scope, form, trust):
    """A method whose trust is a product of gates, with a residual, as a target, a loss or both."""

    def trusted(tokens):
        t = torch.stack([gate(tokens) for gate in gates]).prod(0)
        if scope == "batch":
            t = t / t.mean().clamp(min=1e-3)
        if scope == "sequence":
            t = torch.stack([t[tokens.sequence == i].mean() for i in tokens.sequence])
        return t

    def target(tokens):
        return Target.mix(tokens, trust=trust, residual=residual(tokens), scale=trusted(tokens))

    def loss(tokens):
        q = trust * tokens.one_hot + (1 - trust) * residual(tokens)
        return -trusted(tokens) * (q * tokens.log_probs).sum(-1)

    def rows(logits, labels):
        tokens = Tokens(logits=logits, labels=labels)
        return loss(tokens)

    needs = ("teacher",) if residual in (teacher_top, teacher_whole) else ()
    needs += ("sequence",) if scope == "sequence" else ()
    if form == "rows of logits" and not needs:
        return user_method(loss=rows, scope=scope)
    pair = {"target": (target, None), "loss": (None, loss)}.get(form, (target, loss))
    return user_method(*pair, scope=scope, needs=needs)


def random_methods(number, seed=0):
    """Methods drawn at random from combinations of gates, residuals, forms and scopes."""
    draw = random.Random(seed)
    singles = [(gate,) for gate in GATES]
    pairs = list(itertools.combinations(GATES, 2))
    for _ in range(number):
        gates = draw.choice(singles + pairs)
        scope = draw.choice(["token"] * 4 + ["batch", "sequence"])
        yield combination(gates, draw.choice(RESIDUALS), scope, draw.choice(FORMS), draw.choice([1.0, 0.7]))


def hidden_and_head(vocabulary, n, seed=0):
    """Hidden states and a head whose logits run from flat to peaked rows, the label among them at some."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 24, generator=draw, dtype=torch.float64)
    hidden *= torch.tensor([0.05, 0.4, 1.0, 2.5], dtype=torch.float64)[torch.arange(n) % 4, None]
    head = torch.randn(vocabulary, 24, generator=draw, dtype=torch.float64)
    ranked = (hidden @ head.T).argsort(-1, descending=True)
    rank = torch.tensor([0, 3, 50, 80, vocabulary // 2]).clamp(max=vocabulary - 1)[torch.arange(n) % 5]
    return hidden.requires_grad_(), head.requires_grad_(), ranked.gather(1, rank[:, None])[:, 0]


def compare(variant, vocabulary, n=22, **options):
    """The engine's value and gradients against autograd on whole logits, float64."""
    hidden, head, labels = hidden_and_head(vocabulary, n)
    draw = torch.Generator().manual_seed(5)
    fields = {"sequence": torch.arange(n) // 4}
    if "teacher" in variant.needs:
        fields["teacher"] = 2 * torch.randn(n, vocabulary, generator=draw, dtype=torch.float64)
    whole = variant.loss(Tokens(logits=hidden @ head.T, labels=labels, **fields)).sum() / n
    value = fused_loss(variant, hidden, head, labels, **fields, **options)
    assert_close(value, whole, rtol=1e-9, atol=1e-12)
    for got, expected in zip(*(torch.autograd.grad(v, (hidden, head)) for v in (value, whole)), strict=True):
        assert_close(got, expected, rtol=0, atol=1e-9 * max(1e-3, float(expected.abs().max())))
