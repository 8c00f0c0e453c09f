"""Further SFT losses against what papers and released code compute: values, gradients, floors and clamps."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    assert_agrees,
    by_method,
    ce,
    entropy,
    full,
    hot,
    k3,
    kl,
    logp,
)


def gift(beta=20.0, smooth=0.0, floor=1e-10):
    """Cross entropy to the smoothed reference, tilted by exp(beta) at the label."""

    def loss(t):
        prior = (1 - smooth) * full(t, "reference").exp() + smooth / t.logits.shape[1]
        return -(F.softmax(torch.log(prior + floor) + beta * hot(t), -1) * full(t)).sum(-1)

    return loss


def idft(beta=1.0, low=0.1, high=2.0, mix=1.0, floor=1e-10):
    def loss(t):
        with torch.no_grad():
            typical = logp(t) + entropy(t, 1e-10)  # at 0: as likely as the model's own tokens
            power = 1 + mix * (torch.exp(-typical / beta).clamp(low, high) - 1)
        p = logp(t).exp().clamp(floor, 1)
        return -((p**power).detach() * torch.log(p))

    return loss


def power_loss(power, guard):
    def loss(t):
        with torch.no_grad():
            alpha = power(t)
        return -(logp(t).exp() ** alpha - 1) / (alpha + guard)

    return loss


def cayley(t):
    p = logp(t).exp()
    base = 0.5 * p.mean()
    return (base + (1 - base) * p / (2 - p + 1e-8)).clamp(0.001, 1)


def mile(gamma):
    def loss(t):
        with torch.no_grad():
            p = full(t).exp().clamp(min=1e-8)
            hard = (1 - (p * p.log()).sum(-1)) ** gamma
        return hard / hard.mean() * ce(t)

    return loss


def focal(gamma, detach=False):
    def loss(t):
        p = logp(t).exp()
        return (1 - (p.detach() if detach else p)) ** gamma * ce(t)

    return loss


def truncated(q, k):
    def loss(t):
        p, selected = logp(t).exp(), (logp(t, "old").exp() > k).double()
        return ((1 - p**q) / q - (1 - k**q) / q) * selected

    return loss


def sce(alpha, beta, log_zero=-4.0):
    """Cross entropy both ways; the label's own logarithm is 0, every other's log_zero."""
    return lambda t: alpha * ce(t) - beta * (full(t).exp() * log_zero * (1 - hot(t))).sum(-1)


def poly(*epsilons):
    return lambda t: ce(t) + sum(e * (1 - logp(t).exp()) ** (j + 1) for j, e in enumerate(epsilons))


def bootstrap(beta, detach=True):
    def loss(t):
        p = full(t).exp()
        return beta * ce(t) - (1 - beta) * ((p.detach() if detach else p) * full(t)).sum(-1)

    return loss


def bootstrap_hard(beta):
    return lambda t: (
        beta * ce(t) + (1 - beta) * F.cross_entropy(t.logits, t.logits.detach().argmax(-1), reduction="none")
    )


def unlikelihood(alpha=1.0, nll=1.0, floor=1e-5):
    def loss(t):
        rest = (1 - full(t).exp()).clamp(min=floor)
        return nll * ce(t) - alpha * (t.negatives.double() * rest.log()).sum(-1)

    return loss


def r_drop(weight=1.0, nll=1.0):
    """Two passes; the gradient of the second is its own business."""

    def loss(t):
        first, second = full(t), full(t, "second")
        return nll * (ce(t) - logp(t, "second")) + weight * 0.5 * (kl(first, second) + kl(second, first))

    return loss


def label_kl(estimator, weight=0.1, dft=False, ratio_clamp=20.0, value_clamp=None):
    """verl's kl_penalty on the label's log-probabilities; a + has the gradient of k2."""

    def estimate(gap, name):  # gap = log r_y - log p_y
        if name == "k3+":
            straight = estimate(gap, "k2")
            return straight - straight.detach() + estimate(gap, "k3").detach()
        if name != "k3":
            return -gap if name == "k1" else 0.5 * gap**2
        return k3(gap, ratio_clamp, value_clamp)

    def loss(t):
        base = logp(t).exp().detach() if dft else 1.0
        return base * ce(t) + weight * estimate(logp(t, "reference") - logp(t), estimator)

    return loss


def best(score, share):
    """Cross entropy on the share of the batch with the highest scores."""

    def loss(t):
        values = score(t).detach()
        chosen = values.sort(descending=True, stable=True).indices[: math.ceil(share * len(values))]
        return torch.zeros_like(values).index_fill(0, chosen, 1.0) * ce(t)

    return loss


def excess(t):
    return ce(t) + logp(t, "reference")


def progress(t):
    return -logp(t, "old") - ce(t)


ORACLES = {
    "gift": gift(),
    "gift(beta=1.5, smooth=0.2, floor=0.01)": gift(1.5, 0.2, 0.01),
    "gift@exact(beta=2.0)": gift(2.0, floor=0.0),
    "idft": idft(),
    "idft(beta=0.5, clamp=(0.3, 1.5), mix=0.4)": idft(0.5, 0.3, 1.5, 0.4),
    "idft@warmup": idft(mix=0.0),
    "deft": power_loss(lambda t: (full(t).exp() ** 2).sum(-1), 1e-6),
    "cayley": power_loss(cayley, 1e-8),
    "mile": mile(1.0),
    "mile(gamma=2.5)": mile(2.5),
    **{f"focal(gamma={g})": focal(g) for g in (0.0, 0.5, 1.0, 2.0)},
    "focal@strong": focal(5.0),
    "focal@detached": focal(2.0, detach=True),
    **{f"gce(q={q})": lambda t, q=q: (1 - logp(t).exp() ** q) / q for q in (0.1, 0.7, 1.0)},
    "gce@truncated": truncated(0.7, 0.5),
    "gce(q=0.4, truncate=0.03)": truncated(0.4, 0.03),
    "sce": sce(0.1, 1.0),
    "sce(alpha=2.0, beta=0.3, log_zero=-6.0)": sce(2.0, 0.3, -6.0),
    "mae": lambda t: (full(t).exp() - hot(t)).abs().sum(-1),
    "brier": lambda t: ((full(t).exp() - hot(t)) ** 2).sum(-1),
    "poly": poly(1.0),
    "poly@optax": poly(2.0),
    "poly(epsilon=-0.7)": poly(-0.7),
    "poly(epsilon=(1.0, -0.5, 0.25))": poly(1.0, -0.5, 0.25),
    "bootstrap_soft": bootstrap(0.95),
    "bootstrap_soft@attached(beta=0.6)": bootstrap(0.6, detach=False),
    "bootstrap_hard": bootstrap_hard(0.8),
    "bootstrap_hard(beta=0.0)": bootstrap_hard(0.0),
    "confidence_penalty": lambda t: ce(t) - 0.1 * entropy(t),
    "confidence_penalty(weight=1.5)": lambda t: ce(t) - 1.5 * entropy(t),
    "unlikelihood": unlikelihood(),
    "unlikelihood(alpha=0.3, nll=0.5, floor=0.9)": unlikelihood(0.3, 0.5, 0.9),
    "unlikelihood@sequence": unlikelihood(nll=0.0, floor=1e-20),
    "r_drop": r_drop(),
    "r_drop@readme": r_drop(nll=0.5),
    "r_drop@summarization": r_drop(weight=0.7),
    "sft_reverse_kl": lambda t: ce(t) + 0.1 * kl(full(t), full(t, "reference")),
    "sft_reverse_kl(weight=2.0)": lambda t: ce(t) + 2.0 * kl(full(t), full(t, "reference")),
    **{f"label_kl(estimator={e!r})": label_kl(e) for e in ("k1", "k2", "k3", "k3+")},
    **{f"label_kl(estimator={e!r}, weight=1.5, base='dft')": label_kl(e, 1.5, True) for e in ("k1", "k2", "k3", "k3+")},
    "label_kl(ratio_clamp=None)": label_kl("k3", ratio_clamp=None),
    "label_kl(ratio_clamp=0.5)": label_kl("k3", ratio_clamp=0.5),
    "label_kl(estimator='k3+', ratio_clamp=0.5)": label_kl("k3+", ratio_clamp=0.5),
    "label_kl@verl": label_kl("k3", value_clamp=10.0),
    "label_kl@verl(value_clamp=0.2)": label_kl("k3", value_clamp=0.2),
    "label_kl@verl-k3+(value_clamp=0.2)": label_kl("k3+", value_clamp=0.2),
    "label_kl@skyrl": label_kl("k3", 0.03, dft=True, ratio_clamp=10.0),
    "token_mask": lambda t: t.critical.double() * ce(t),
    "token_mask@rho-1": best(excess, 0.6),
    "token_mask@rho-1(keep=0.31)": best(excess, 0.31),
    "token_mask@sstoken": best(progress, 0.6),
}


@pytest.mark.parametrize("name", by_method(ORACLES))
def test_losses_are_those_of_paper_and_released_code(name):
    for spec in by_method(ORACLES)[name]:
        assert_agrees(spec, ORACLES[spec])
