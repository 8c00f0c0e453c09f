"""The authors' table against the losses that its papers and their released code compute: values, gradients, edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    BATCHES,
    USUAL,
    assert_agrees,
    assert_near,
    by_method,
    ce,
    full,
    hot,
    kl,
    label,
    logit_of,
    logp,
    one,
    p_of,
    push,
)
from torch.testing import assert_close

import qlens
from qlens.testing import random_tokens


def dft(t):
    return p_of(t).detach() * ce(t)


def general_family(alpha):
    return lambda t: -(torch.exp(alpha * logp(t)) - 1) / alpha


def masked_loss(loss, mask):
    """The loss where a mask, computed without gradient, is True."""
    return lambda t: loss(t) * mask(p_of(t).detach()).double()


def one_minus(t):
    return 1 - p_of(t)


def profit(drop):
    """ProFiT sets dropped labels to -100 and leaves the rest to cross entropy."""

    def loss(t):
        dropped = drop(full(t).exp().detach().gather(1, t.labels[:, None])[:, 0])
        return F.cross_entropy(t.logits, t.labels.masked_fill(dropped, -100), reduction="none", ignore_index=-100)

    return loss


def top_entropy(z, k, floor=0.0):
    q = z.topk(min(k, z.shape[-1]), dim=-1).values.softmax(-1)
    return -(q * torch.log(q + floor)).sum(-1)


def eaft(gate, k=20, floor=0.0, attached=False):
    """Cross entropy weighted by a gate on the top-k entropy and p_y."""

    def loss(t):
        h = top_entropy(t.logits if attached else t.logits.detach(), k, floor)
        return gate(h, p_of(t).detach()) * ce(t)

    return loss


def conflict(h, p):
    return 1 - ((h <= h.quantile(0.15)) & (p <= p.quantile(0.15))).double()


def iw(clamp, temperature=1.0, level="mean", normalize=None, policy="logits", attached=False):
    """exp of the mean (sum) log-ratio of a sequence to the reference, clamped, times the cross entropy."""

    def loss(t):
        gap = temperature * (logp(t, policy) - logp(t, "reference"))
        gap = gap if attached else gap.detach()
        index = torch.arange(len(t)) if level == "token" else t.sequence.unique(return_inverse=True)[1]
        logs = torch.stack([getattr(gap[index == i], "sum" if level == "sum" else "mean")() for i in index.unique()])
        weights = logs.exp().clamp(*clamp)
        return (weights / (1 if normalize is None else getattr(weights, normalize)()))[index] * ce(t)

    return loss


def anchored(weight, reverse=False, base=dft):
    def loss(t):
        p, r = full(t), full(t, "reference")
        return base(t) + weight * (kl(p, r) if reverse else kl(r, p))

    return loss


def psft(high, clamp=20.0):
    """verl's clipped policy loss at advantage 1."""

    def loss(t):
        gap = logp(t) - logp(t, "old")
        ratio = torch.exp(gap if clamp is None else gap.clamp(-clamp, clamp))
        return torch.max(-ratio, -ratio.clamp(1 - 0.2, 1 + high))

    return loss


def gem(beta, logsigmoid=False):
    def loss(t):
        with torch.no_grad():
            ahead = t.logits - label(t.logits, t)[:, None]
            weights = torch.sigmoid(0.01 * ahead) if logsigmoid else torch.ones_like(ahead)
            q = F.softmax(t.logits / beta, -1)
        logs = full(t)
        return -(q * weights * (label(logs, t)[:, None] - logs)).sum(-1)

    return loss


def soft(temperature):
    return lambda t: kl(full(t, "teacher", temperature), full(t, temperature=temperature))


def target_sft(eta):
    """Cross entropy to the label by its probability, to the geometric mix of student and teacher by the rest."""

    def loss(t):
        with torch.no_grad():
            guided = full(t).exp() ** (1 - eta) * full(t, "teacher").exp() ** eta
            q = p_of(t)[:, None] * hot(t) + (1 - p_of(t))[:, None] * guided / guided.sum(-1, keepdim=True)
        return -(q * full(t)).sum(-1)

    return loss


def fairseq(epsilon):
    def loss(t):
        other = epsilon / (t.logits.shape[1] - 1)
        return (1 - epsilon - other) * ce(t) + other * -full(t).sum(-1)

    return loss


LN20 = math.log(20)
ORACLES = {
    "sft": ce,
    "beyond_log(alpha=0.0)": ce,
    "beyond_log@logp": lambda t: -logp(t),
    "beyond_log": one_minus,
    "beyond_log@GeneralFamily-10": general_family(10.0),
    **{f"beyond_log(alpha={a})": general_family(a) for a in (0.1, 0.5, 2.0, 10.0, -0.5)},
    "beyond_log_log1mp": lambda t: torch.log(1 - p_of(t)),
    "beyond_log_threshold": masked_loss(ce, lambda p: p >= 0.2),
    "beyond_log_threshold@OnlyTopP(threshold=0.05)": masked_loss(one_minus, lambda p: p >= 0.05),
    "beyond_log_threshold@OnlyBottomP": masked_loss(one_minus, lambda p: p <= 0.2),
    "beyond_log_threshold@OnlyBottomLogP(threshold=0.05)": masked_loss(ce, lambda p: p <= 0.05),
    "beyond_log_threshold@base-quantile": lambda t: (
        ce(t) * (p_of(t, "reference") >= p_of(t, "reference").quantile(0.2))
    ),
    "dft": dft,
    "profit": profit(lambda p: p < 0.1),
    "profit@paper": profit(lambda p: p <= 0.1),
    "profit@lower(threshold=0.05)": profit(lambda p: p > 0.05),
    "profit@middle(threshold=0.02)": profit(lambda p: (p < 0.02) | (p > 0.9)),
    "profit(keep='middle', threshold=0.03, upper=0.06)": profit(lambda p: (p < 0.03) | (p > 0.06)),
    "eaft": eaft(lambda h, p: h / LN20),
    "eaft@llama-factory": eaft(lambda h, p: h / 3.0),
    "eaft@axolotl": eaft(lambda h, p: h, floor=1e-10),
    "eaft@axolotl(k=10, alpha=2.0)": eaft(lambda h, p: h**2, k=10, floor=1e-10),
    "eaft@llama-factory(k=100)": eaft(lambda h, p: h / 3.0, k=100),
    "eaft@squared": eaft(lambda h, p: (h / LN20) ** 2),
    "eaft@cubed": eaft(lambda h, p: (h / LN20) ** 3),
    "eaft@sigmoid": eaft(lambda h, p: torch.sigmoid(30 * (h / LN20 - 0.17))),
    "eaft@mask": eaft(lambda h, p: (h > h.quantile(0.15)).double()),
    "eaft@conflict": eaft(conflict),
    "eaft@attached": eaft(lambda h, p: h / LN20, attached=True),
    "eaft@sigmoid(detach=False)": eaft(lambda h, p: torch.sigmoid(30 * (h / LN20 - 0.17)), attached=True),
    "iw_sft": iw((0.0, 16.0)),
    "iw_sft(level='sequence_sum', temperature=0.5, clamp=(0.1, 4.0))": iw((0.1, 4.0), 0.5, "sum"),
    "iw_sft@control": iw((0.0, 1000.0), 10.0, normalize="sum", policy="old"),
    "iw_sft@control-step": iw((0.0, 2.0), 10.0, "token", normalize="sum", policy="old"),
    "iw_sft(normalize='mean')": iw((0.0, 16.0), normalize="mean"),
    "iw_sft@step": iw((0.2, 1.8), level="token"),
    "iw_sft@rpsft": iw((0.0, 16.0), attached=True),
    "iw_sft(detach=False, clamp=(0.8, 1.2))": iw((0.8, 1.2), attached=True),
    "cft": lambda t: t.critical.double() * ce(t),
    "label_smoothing": lambda t: ce(t, label_smoothing=0.1),
    "label_smoothing(epsilon=0.3)": lambda t: 0.7 * ce(t) + 0.3 * -full(t).mean(-1),
    "label_smoothing@fairseq": fairseq(0.1),
    "label_smoothing@fairseq(epsilon=0.4)": fairseq(0.4),
    "sft_kl": anchored(0.1, base=ce),
    "sft_kl(weight=2.0)": anchored(2.0, base=ce),
    "asft_anchored": anchored(0.05),
    "asft_anchored@code": anchored(0.1),
    "asft_anchored@bf16": anchored(0.03),
    "asft_anchored@v1": anchored(0.05, reverse=True),
    "asft_anchored(direction='reverse', weight=1.5)": anchored(1.5, reverse=True),
    "psft": psft(0.28),
    "psft@tight": psft(0.14),
    "psft@wide": psft(0.42),
    "psft@paper": psft(0.28, clamp=None),
    "gem": gem(0.7),
    "gem@scripts": gem(0.7, logsigmoid=True),
    "gem(beta=1.6)": gem(1.6),
    "kd": soft(1.0),
    "kd@soft": soft(2.0),
    "kd@hinton": lambda t: 4.0 * soft(2.0)(t),
    "kd_hybrid": lambda t: 0.5 * ce(t) + 0.5 * soft(1.0)(t),
    "kd_hybrid(weight=0.3, temperature=3.0)": lambda t: 0.7 * ce(t) + 0.3 * 9.0 * soft(3.0)(t),
    "kd_hybrid@liger": lambda t: 0.5 * ce(t) + 0.5 * soft(2.0)(t),
    "kd_hybrid@ms-swift": lambda t: ce(t) + soft(1.0)(t),
    **{f"target_sft(eta={eta})": target_sft(eta) for eta in (0.0, 0.3, 0.5, 1.0)},
}


@pytest.mark.parametrize("name", by_method(ORACLES))
def test_losses_are_those_of_paper_and_released_code(name):
    for spec in by_method(ORACLES)[name]:
        assert_agrees(spec, ORACLES[spec])


def test_means_over_selected_tokens_are_declared():
    specs = ("beyond_log_threshold", "beyond_log_threshold@base-quantile", "cft", "profit")
    assert [qlens.get(spec).denominator for spec in specs] == ["selected", "selected", "selected", "valid"]


@pytest.mark.parametrize(("spec", "is_kept"), [("profit", True), ("profit@paper", False), ("profit@lower", True)])
def test_profit_keeps_a_probability_at_the_threshold_unlike_the_paper(spec, is_kept):
    tokens = one(0.0, v=2)  # p_y is 0.5 exactly
    method = qlens.get(spec, threshold=0.5)
    assert_near(method.target(tokens).q, hot(tokens) if is_kept else torch.full((1, 2), 0.5).double())
    assert_near(method.loss(tokens), is_kept * ce(tokens))


def test_profit_at_random_drops_the_share_it_names():
    tokens = random_tokens(2000, 3)
    method = qlens.get("profit@random", threshold=0.3)
    rows = method.loss(tokens)
    assert_agrees(method.spec, lambda t: ce(t) * (rows > 0), tokens)
    assert_close((rows == 0).double().mean(), torch.tensor(0.3).double(), rtol=0, atol=0.05)
    assert_near(qlens.get("profit@random", threshold=0.0).loss(tokens), ce(tokens))
    other_seed = qlens.get("profit@random", threshold=0.3, seed=1).loss(tokens) == 0
    assert_close(((rows == 0) & other_seed).double().mean(), torch.tensor(0.09).double(), rtol=0, atol=0.03)


@pytest.mark.parametrize("tokens", BATCHES)
def test_released_entropy_gates_differ_by_their_constants(tokens):
    paper = push("eaft", tokens)
    assert_close(push("eaft@llama-factory", tokens), paper * LN20 / 3.0)  # 0.9986
    assert_close(push("eaft@axolotl", tokens), paper * LN20, rtol=1e-7, atol=1e-7)  # 2.9957
    assert float(push("eaft@llama-factory", tokens).max()) <= 0.99858


def test_entropy_gates_that_do_not_exist_are_refused():
    for spec in ("eaft(k=1)", "eaft@mask(detach=False)", "eaft@conflict(detach=False)"):
        with pytest.raises(qlens.InputError):
            qlens.get(spec).target(USUAL)


def test_the_weight_of_iw_sft_rises_with_the_label_and_ends_at_its_clamp():
    tokens = [one(z).replace(sequence=torch.tensor([0])) for z in (-1.0, 0.0, 1.0, 9.0)]
    actual = torch.cat([push("iw_sft", t) for t in tokens])
    expected = torch.cat([(p_of(t) * 6) for t in tokens])
    assert_near(actual, expected)
    sharper = torch.cat([push("iw_sft(clamp=(0.9, 2.0))", t) for t in tokens])
    assert_near(sharper, expected.clamp(0.9, 2.0))
    far = one(0.0, v=200, reference=-800.0).replace(sequence=torch.tensor([0]))
    assert_near(push("iw_sft", far), torch.tensor([16.0]).double())


def test_proximal_sft_clips_above_only():
    for ratio, weight in ((0.01, 0.01), (0.7, 0.7), (1.279, 1.279), (1.281, 0.0), (5.0, 0.0)):
        tokens = one(logit_of(0.1 * ratio), old=logit_of(0.1))
        assert_near(push("psft", tokens), torch.tensor([weight], dtype=torch.float64))


def test_sft_kl_is_a_mixture_at_its_structural_scale():
    target = qlens.get("sft_kl", weight=0.25).target(USUAL)
    assert_near(target.scale, torch.full_like(target.scale, 1.25))
    assert_near(target.trust, torch.full_like(target.scale, 0.8))
    assert_near(target.residual, full(USUAL, "reference").exp())
    anchor, p = qlens.get("asft_anchored").target(USUAL), p_of(USUAL)
    assert_near(anchor.scale, p + 0.05)
    assert_near(anchor.trust, p / (p + 0.05))
    assert_near(anchor.residual, full(USUAL, "reference").exp())
    natural = anchor.at("natural")
    assert bool((natural.scale < anchor.scale).all())
    assert_near(natural.q.min(-1).values, torch.zeros(40).double())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_target_sft_guides_in_logits_even_where_some_are_impossible(eta):
    shut = torch.zeros(40, 32).bool().scatter(1, (USUAL.labels[:, None] + 1) % 32, True)
    tokens = USUAL.replace(logits=USUAL.logits.masked_fill(shut, -torch.inf))
    tokens = tokens.replace(teacher=tokens.teacher.masked_fill(shut, -torch.inf))
    target = qlens.get("target_sft", eta=eta).target(tokens)
    mixed = ((1 - eta) * USUAL.logits + eta * USUAL.teacher).masked_fill(shut, -torch.inf).softmax(-1)
    p = p_of(tokens)[:, None]
    assert_near(target.q, p * hot(tokens) + (1 - p) * mixed)
