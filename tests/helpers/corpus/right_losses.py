"""Correct losses of rows, (N, V) logits and (N,) labels, that `check` must pass.

RIGHT maps a name to the loss; FINDINGS names the items that fail for a true reason.
"""

import functools

import torch
import torch.nn.functional as F
from losses import label_log_probs
from torch import nn
from torch.utils.checkpoint import checkpoint

RIGHT, FINDINGS = {}, {}


def right(loss=None, **findings):
    """Decorator: a loss of the corpus; ``findings`` maps items that fail to a part of their evidence."""
    if loss is None:
        return functools.partial(right, **findings)
    RIGHT[loss.__name__] = loss
    FINDINGS[loss.__name__] = findings
    return loss


@right
def cross_entropy_sum(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum")


@right
def cross_entropy_unreduced(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


@right
def cross_entropy_on_one_hot(logits, labels):
    return F.cross_entropy(logits, F.one_hot(labels, logits.size(-1)).to(logits.dtype))


@right
def nll_of_log_softmax(logits, labels):
    return F.nll_loss(F.log_softmax(logits, dim=-1), labels)


@right
def gathered(logits, labels):
    return -label_log_probs(logits, labels).mean()


@right
def logsumexp_minus_label(logits, labels):
    rows = torch.arange(labels.numel())
    return (torch.logsumexp(logits, -1) - logits[rows, labels]).mean()


@right
def smoothed(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


@right
def smoothed_by_hand(logits, labels):
    log_p = F.log_softmax(logits, -1)
    nll, uniform = -log_p.gather(-1, labels[:, None])[:, 0], -log_p.mean(-1)
    return (0.9 * nll + 0.1 * uniform).mean()


@right
def ignores_minus_100(logits, labels):
    return nn.CrossEntropyLoss(ignore_index=-100)(logits, labels)


@right
def class_weights(logits, labels):
    weight = torch.ones(logits.size(-1), dtype=logits.dtype)
    weight[3] = 5.0
    return F.cross_entropy(logits, labels, weight=weight, reduction="sum") / labels.numel()


@right
def upcast(logits, labels):
    return F.cross_entropy(logits.float(), labels)


@right
def autocast_inside(logits, labels):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scaled = logits @ torch.eye(logits.size(-1), dtype=logits.dtype)
    return F.cross_entropy(scaled.float(), labels)


@right
def focal(logits, labels, *, gamma=2.0):
    nll = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-nll)) ** gamma * nll).mean()


@right
def z_loss_on_purpose(logits, labels):
    return F.cross_entropy(logits, labels) + 1e-4 * torch.logsumexp(logits, -1).pow(2).mean()


@right
def entropy_bonus(logits, labels):
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    return F.cross_entropy(logits, labels) + 0.05 * (p * log_p).sum(-1).mean()


@right
def distilled(logits, labels, teacher, *, temperature=2.0, alpha=0.5):
    soft = F.kl_div(
        F.log_softmax(logits / temperature, -1), F.softmax(teacher / temperature, -1), reduction="batchmean"
    )
    return alpha * F.cross_entropy(logits, labels) + (1 - alpha) * temperature**2 * soft


@right
def distilled_by_logs(logits, labels, teacher):
    return F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


@right
def generalized_jsd(logits, labels, teacher, *, beta=0.5):
    s, t = logits.log_softmax(-1), teacher.log_softmax(-1)
    mixed = torch.logsumexp(torch.stack([s + torch.tensor(1 - beta).log(), t + torch.tensor(beta).log()]), 0)
    kl = functools.partial(F.kl_div, reduction="none", log_target=True)
    return (beta * kl(mixed, t) + (1 - beta) * kl(mixed, s)).sum(-1).mean()


@right
def top_teacher_tokens(logits, labels, teacher, *, k=50):
    values, ids = teacher.topk(k, dim=-1)
    q, log_p = values.softmax(-1), logits.log_softmax(-1).gather(-1, ids)
    return -(q * log_p).sum(-1).mean()


@right
def dft(logits, labels):
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (nll * torch.exp(-nll.detach())).mean()


@right
def hardest_half(logits, labels):
    nll = F.cross_entropy(logits, labels, reduction="none")
    return nll.topk(max(1, nll.numel() // 2)).values.mean()


@right
def easiest_tenth(logits, labels):
    nll = F.cross_entropy(logits, labels, reduction="none")
    return nll.topk(max(1, nll.numel() // 10), largest=False).values.mean()


@right
def drops_rare_tokens(logits, labels):
    nll = F.cross_entropy(logits, labels, reduction="none")
    selected = (nll.detach() < 4.0).to(nll.dtype)
    return (nll * selected).sum() / labels.numel()


@right
def unlikely_neighbours(logits, labels):
    """Unlikelihood of a fixed set of tokens that must not be said."""
    p = logits.softmax(-1)
    banned = torch.zeros_like(p).index_fill(-1, torch.tensor([1, 5]), 1.0).scatter(-1, labels[:, None], 0.0)
    return F.cross_entropy(logits, labels) - 0.2 * (torch.log1p(-p.clamp(max=1 - 1e-6)) * banned).sum(-1).mean()


@right
def weighted_tokens(logits, labels, weight):
    return (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / labels.numel()


@right
def policy_gradient(logits, labels, old, advantage):
    ratio = torch.exp(label_log_probs(logits, labels) - label_log_probs(old, labels).detach())
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


@right
def entropy_over_its_mean(logits, labels):
    """A batch of nothing but sure tokens has no entropy to divide by: a remark."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).detach()
    return (F.cross_entropy(logits, labels, reduction="none") * entropy / entropy.mean()).mean()


@right
def penalised_by_k3(logits, labels, reference):
    """A penalty that grows as r / p itself: overflow at impossible labels is no fault of the code."""
    log_ratio = label_log_probs(reference, labels) - label_log_probs(logits, labels)
    return F.cross_entropy(logits, labels) + 0.1 * (log_ratio.exp() - log_ratio - 1).mean()


@right
def anchored_to_a_reference(logits, labels, reference):
    log_p, log_r = logits.log_softmax(-1), reference.log_softmax(-1)
    return F.cross_entropy(logits, labels) + 0.1 * (log_p.exp() * (log_p - log_r)).sum(-1).mean()


@right
def checkpointed_chunks(logits, labels):
    def part(z, y):
        return F.cross_entropy(z, y, reduction="sum")

    parts = [
        checkpoint(part, z, y, use_reentrant=False) for z, y in zip(logits.split(32), labels.split(32), strict=True)
    ]
    return torch.stack(parts).sum() / labels.numel()


@right
def counts_what_it_saw(logits, labels):
    """Entropy is computed for the log, and printed."""
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
    print("entropy", float(entropy.mean()))
    return F.cross_entropy(logits, labels)


@right
def special_token_of_a_vocabulary(logits, labels):
    """The column of a special token, 3,000, is masked; smaller vocabularies have no such column."""
    masked = logits.index_fill(-1, torch.tensor([3_000]), -1e30)
    return F.cross_entropy(masked, labels)


class TopEntropy(nn.Module):
    """Weighs a token by the entropy of the top candidates, without gradient."""

    def __init__(self, k=50):
        super().__init__()
        self.k = k

    def forward(self, logits, labels):
        with torch.no_grad():
            p = logits.topk(self.k, -1).values.softmax(-1)
            weight = -(p * p.clamp(min=1e-12).log()).sum(-1) / torch.tensor(float(self.k)).log()
        return (weight * F.cross_entropy(logits, labels, reduction="none")).mean()


class FixedClasses(nn.Module):
    """A weight per token of a vocabulary of 1,500."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 1.5, 1500, dtype=torch.float64))

    def forward(self, logits, labels):
        weight = self.weight.to(logits.dtype)
        return F.cross_entropy(logits, labels, weight=weight, reduction="none").mean()


RIGHT |= {
    "torch_function": F.cross_entropy,
    "torch_module": nn.CrossEntropyLoss(),
    "fused_head": F.linear_cross_entropy,
}
RIGHT |= {"a_module": TopEntropy(), "class_weights_of_a_size": FixedClasses()}
