"""Oracles: losses as papers and released code compute them, by plain torch, and their comparison with a method."""

import math
import re
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import qlens
from qlens.core.autograd import gradient
from qlens.core.tokens import Tokens
from qlens.testing import random_tokens

NEAR, USUAL, SHARP = (
    random_tokens(40, 24, spread=0.3, seed=5),
    random_tokens(40, 32, spread=1.5, seed=6),
    random_tokens(24, 50, spread=4.0, seed=7),
)
BATCHES = (NEAR, USUAL, SHARP)

Oracle = Callable[[Tokens], Tensor]


def assert_agrees(spec: str, oracle: Oracle, *batches: Tokens, value: str | None = "row") -> None:
    """Target and loss have the gradient of the oracle; ``value``: what its entries are losses of, or None: not compared.

    "row": a token each; "sequence" or "pair": one each, in the order of their ids; "batch": one number.
    """
    variant = qlens.get(spec)
    for tokens in batches or BATCHES:
        printed, grad = differentiate(oracle, tokens)
        assert_near(variant.target(tokens).grad, grad, f"{spec}: the target's gradient")
        assert_near(gradient(variant.loss, tokens), grad, f"{spec}: the gradient of its loss")
        if value is not None:
            assert_near(grouped(variant.loss(tokens), tokens, value), printed, f"{spec}: its value")


def by_method(specs: Iterable[str]) -> dict[str, list[str]]:
    """Specs by the method's name."""
    groups: dict[str, list[str]] = {}
    for spec in specs:
        groups.setdefault(re.split("[@(]", spec)[0], []).append(spec)
    return groups


def differentiate(oracle: Oracle, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """What the oracle prints, and the gradient of its sum by the student's logits."""
    leaf = tokens.logits.clone().requires_grad_()
    printed = oracle(tokens.replace(logits=leaf))
    return printed.detach(), torch.autograd.grad(printed.sum(), leaf)[0]


def grouped(rows: Tensor, tokens: Tokens, by: str) -> Tensor:
    """Rows added up over their sequences, their pairs or the batch."""
    if by == "batch":
        return rows.sum()
    return rows if by == "row" else torch.stack([rows[own].sum() for own in members(getattr(tokens, by))])


def assert_near(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert_close(actual, expected, rtol=1e-9, atol=1e-10, msg=lambda text: f"{what}: {text}")


def unit(spec: str, tokens: Tokens) -> Tensor:
    """Q in unit scale."""
    return qlens.get(spec).target(tokens).at("unit").q


def push(spec: str, tokens: Tokens) -> Tensor:
    """a in g = a (p - d), read off the label's entry; the target must have no other."""
    grad, p = qlens.get(spec).target(tokens).grad, tokens.logits.softmax(-1)
    a = -label(grad, tokens) / (1 - label(p, tokens))
    assert_near(grad, a[:, None] * (p - hot(tokens)), f"{spec}: a push on the label alone")
    return a


def label(values: Tensor, tokens: Tokens) -> Tensor:
    """The label's entry of every row."""
    return values.gather(1, tokens.labels.unsqueeze(1)).squeeze(1)


def hot(tokens: Tokens) -> Tensor:
    return F.one_hot(tokens.labels, tokens.logits.shape[1]).double()


def full(tokens: Tokens, model: str = "logits", temperature: float = 1.0) -> Tensor:
    """log-probabilities of a model over the vocabulary; only the student's carry a gradient."""
    return F.log_softmax(getattr(tokens, model) / temperature, -1)


def logp(tokens: Tokens, model: str = "logits") -> Tensor:
    """log-probabilities of the labels."""
    return label(full(tokens, model), tokens)


def p_of(t, model="logits"):
    return logp(t, model).exp()


def ce(tokens: Tokens, **options) -> Tensor:
    return F.cross_entropy(tokens.logits, tokens.labels, reduction="none", **options)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of every row."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def k3(gap: Tensor, clamp: float | None = None, value_clamp: float | None = None) -> Tensor:
    """The estimate e^gap - gap - 1 of KL(p || r) from gap = log r_y - log p_y, with the clamps of released code."""
    gap = gap if clamp is None else gap.clamp(-clamp, clamp)
    value = gap.exp() - gap - 1
    return value if value_clamp is None else value.clamp(-value_clamp, value_clamp)


def entropy(tokens: Tokens, floor: float = 0.0) -> Tensor:
    p = full(tokens).exp()
    return -(p * torch.log(p + floor)).sum(-1)


def members(ids: Tensor) -> list[Tensor]:
    """The positions of every group, in the order of its id."""
    return [(ids == i).nonzero().squeeze(1) for i in ids.unique(sorted=True)]


def sides(tokens: Tokens) -> list[tuple[Tensor, Tensor]]:
    """The positions of the chosen and of the rejected sequence of every pair."""
    return [(own[tokens.chosen[own]], own[~tokens.chosen[own]]) for own in members(tokens.pair)]


def one(label_logit: float, v: int = 6, **other_logits: float) -> Tokens:
    """One token whose label (0) has this logit and whose other logits are 0; so have other models, by name."""
    row = F.one_hot(torch.tensor([0]), v).double()
    models = {
        name: logit * row for name, logit in ({"reference": 0.0, "teacher": 0.0, "old": 0.0} | other_logits).items()
    }
    return Tokens(logits=label_logit * row, labels=torch.tensor([0]), **models)


def logit_of(prob: float, v: int = 6) -> float:
    """The label's logit among v - 1 zeros that gives it this probability."""
    return math.log(prob) - math.log1p(-prob) + math.log(v - 1)


def number(value):
    return torch.tensor([value], dtype=torch.float64)
