"""Objectives as released code writes them, rewritten here, and common mistakes about their targets."""

import torch
import torch.nn.functional as F


def label_log_probs(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def nll(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def flooded(logits, labels):
    return (nll(logits, labels).mean() - 0.5).abs() + 0.5


def dft_by_sum(logits, labels):
    """DFT divided by the sum of its weights."""
    weight = (-nll(logits, labels)).exp().detach()
    return (weight * nll(logits, labels)).sum() / weight.sum()


def eaft_without_normaliser(logits, labels):
    with torch.no_grad():
        top = logits.topk(min(20, logits.shape[-1]), -1).values.log_softmax(-1)
        entropy = -(top.exp() * top).sum(-1)
    return (entropy * F.cross_entropy(logits, labels, reduction="none")).mean()


def single_token_k3(logits, labels, reference):
    """Anchored by an estimate of the KL that sees the label only, of which no reference residual is left."""
    log_p = label_log_probs(logits, labels)
    gap = label_log_probs(reference, labels) - log_p
    return (-log_p + 0.1 * (gap.exp() - gap - 1)).mean()


def clipped_ratio(logits, labels, old):
    ratio = (label_log_probs(logits, labels) - label_log_probs(old, labels)).exp()
    return -torch.minimum(ratio, ratio.clamp(0.8, 1.28)).mean()


def truncated_top_k(logits, labels, teacher, *, k: int = 4):
    log_t, ids = teacher.log_softmax(-1).topk(k, -1)
    return (log_t.exp() * (log_t - logits.log_softmax(-1).gather(-1, ids))).sum(-1).mean()


def gem_linear(logits, labels):
    with torch.no_grad():
        q = (logits / 0.7).softmax(-1)
    log_p = logits.log_softmax(-1)
    return (q * (log_p - log_p.gather(-1, labels[:, None]))).sum(-1).mean()


def forgot_detach(logits, labels):
    log_p = label_log_probs(logits, labels)
    return -(log_p.exp() * log_p).mean()


def reverse_kl(logits, labels, teacher):
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * (log_p - teacher.log_softmax(-1))).sum(-1).mean()


def with_z_loss(logits, labels):
    return F.cross_entropy(logits, labels) + 1e-4 * logits.logsumexp(-1).square().mean()


def behind_a_soft_cap(logits, labels):
    return F.cross_entropy(30 * torch.tanh(logits / 30), labels)


def clamped(logits, labels):
    return F.cross_entropy(logits.clamp(min=-8.0), labels)


def root_weighted(logits, labels):
    log_p = label_log_probs(logits, labels)
    return -((log_p / 2).exp().detach() * log_p).mean()


def fused(model, inputs, return_outputs=False, num_items_in_batch=None):
    """A trainer's compute_loss with a kernel in it that multiplies by the head: nobody sees logits."""
    hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state[:, :-1].flatten(0, 1)
    labels = inputs["labels"][:, 1:].flatten()
    total = F.linear_cross_entropy(hidden, model.lm_head.weight, labels, reduction="sum")
    loss = total / (num_items_in_batch or (labels != -100).sum())
    return (loss, hidden) if return_outputs else loss
