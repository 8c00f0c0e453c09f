"""Correct losses of (B, T) batches, as transformers, TRL, OpenRLHF and trainers write them.

Each shifts inside, unless it says otherwise. The corpus is RIGHT of `right_losses`, which this module adds to.
"""

import torch
import torch.nn.functional as F
from right_losses import right
from torch import nn
from torch.utils.checkpoint import checkpoint

UNTOLD = "it takes no num_items_in_batch: 2x4 gives 2 and 8x1 8 times"


def shifted(logits, labels):
    return logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()


def per_token(logits, labels):
    """The negative log-likelihood at every position, 0 where the label is -100; (B, T - 1) both."""
    z, y = shifted(logits, labels)
    return F.cross_entropy(z.transpose(1, 2), y, reduction="none", ignore_index=-100), y != -100


def divided(total, supervised, num_items_in_batch):
    return total / (supervised.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


@right
def fixed_cross_entropy(outputs, labels, num_items_in_batch=None, ignore_index=-100):
    z, y = shifted(outputs.logits.float(), labels)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(z.view(-1, z.size(-1)), y.view(-1), ignore_index=ignore_index, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


@right
def pads_the_labels(outputs, labels, num_items_in_batch=None, **kwargs):
    """The labels are padded on the right and shifted, so that the logits need no copy."""
    y = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    total = F.cross_entropy(outputs.logits.flatten(0, 1), y, reduction="sum")
    return divided(total, y != -100, num_items_in_batch)


@right
def label_smoother(outputs, labels, num_items_in_batch=None, *, epsilon=0.1):
    z, y = shifted(outputs.logits, labels)
    log_p, supervised = z.log_softmax(-1), y != -100
    nll = -log_p.gather(-1, y.clamp(min=0)[..., None])[..., 0] * supervised
    uniform = -log_p.mean(-1) * supervised
    return divided(((1 - epsilon) * nll + epsilon * uniform).sum(), supervised, num_items_in_batch)


@right
def sft_dft(outputs, labels, num_items_in_batch=None):
    z, y = shifted(outputs.logits, labels)
    supervised = y != -100
    log_p = z.log_softmax(-1).gather(-1, y.masked_fill(~supervised, 0)[..., None])[..., 0]
    loss = -(log_p.exp().detach() * log_p) * supervised
    return divided(loss.sum(), supervised, num_items_in_batch)


@right
def chunked_nll(outputs, labels, num_items_in_batch=None, *, chunk=16):
    """Chunks of positions, recomputed in the backward pass, added up and divided once."""
    z, y = shifted(outputs.logits, labels)
    z, y = z.reshape(-1, z.size(-1)), y.reshape(-1)
    nll = [
        checkpoint(F.cross_entropy, z[i : i + chunk], y[i : i + chunk], reduction="sum", use_reentrant=False)
        for i in range(0, len(y), chunk)
    ]
    return divided(sum(nll), y != -100, num_items_in_batch)


@right
def logs_entropy(outputs, labels, num_items_in_batch=None):
    nll, supervised = per_token(outputs.logits, labels)
    with torch.no_grad():
        log_p = outputs.logits[:, :-1].log_softmax(-1)
        print({"entropy": float(-(log_p.exp() * log_p).nan_to_num().sum(-1)[supervised].mean())})
    return divided((nll * supervised).sum(), supervised, num_items_in_batch)


@right(accumulation=UNTOLD)
def takes_an_attention_mask(logits, labels, attention_mask):
    nll, _ = per_token(logits, labels)
    mask = attention_mask[:, 1:].to(nll.dtype)
    return (nll * mask).sum() / mask.sum()


@right
def multi_token_prediction(outputs, labels, num_items_in_batch=None):
    n = (labels[:, 1:] != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    total = 0.0
    for ahead, weight in ((1, 1.0), (2, 0.25), (3, 0.1)):
        z, y = outputs.logits[:, :-ahead].flatten(0, 1), labels[:, ahead:].flatten()
        total = total + weight * F.cross_entropy(z, y, reduction="sum")
    return total / n


@right
def hard_examples(outputs, labels, num_items_in_batch=None, *, share=0.5):
    """The hardest half of the tokens of a batch, by their loss."""
    nll, supervised = per_token(outputs.logits, labels)
    losses = nll[supervised]
    if not losses.numel():
        return outputs.logits.sum() * 0.0
    return losses.topk(max(1, int(share * losses.numel()))).values.mean()


@right(accumulation="it divides by the texts of each micro-batch")
def mean_of_texts(outputs, labels, num_items_in_batch=None):
    """Every text counts once; a trainer that tells a token count has no use for it, and the micro-batches do not add up."""
    nll, supervised = per_token(outputs.logits, labels)
    return ((nll * supervised).sum(1) / supervised.sum(1).clamp(min=1)).mean()


@right
def mean_of_texts_untold(outputs, labels):
    nll, supervised = per_token(outputs.logits, labels)
    return ((nll * supervised).sum(1) / supervised.sum(1).clamp(min=1)).mean()


@right(accumulation="it takes no num_items_in_batch: 2x4 gives 2 and 8x1 8 times")
def mean_of_tokens_untold(outputs, labels):
    nll, supervised = per_token(outputs.logits, labels)
    return (nll * supervised).sum() / supervised.sum().clamp(min=1)


@right
def unlikelihood_of_repeats(outputs, labels, num_items_in_batch=None, *, weight=0.5):
    """Pushes down, at every token, the tokens that came before it in the same text."""
    z, y = shifted(outputs.logits, labels)
    supervised = y != -100
    log_p = z.log_softmax(-1)
    nll = -log_p.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    labels_seen = F.one_hot(y.clamp(min=0), z.size(-1)) * supervised[..., None]
    before = (labels_seen.cumsum(1) - labels_seen > 0).to(z.dtype).scatter(-1, y.clamp(min=0)[..., None], 0.0)
    push = -((1 - log_p.exp()).clamp(min=1e-5).log() * before).sum(-1)
    return divided(((nll + weight * push) * supervised).sum(), supervised, num_items_in_batch)


@right
def entropy_regularised(outputs, labels, num_items_in_batch=None):
    nll, supervised = per_token(outputs.logits, labels)
    entropy = torch.distributions.Categorical(logits=outputs.logits[:, :-1]).entropy()
    return divided(((nll - 0.01 * entropy) * supervised).sum(), supervised, num_items_in_batch)


@right
def z_loss_where_supervised(outputs, labels, num_items_in_batch=None):
    nll, supervised = per_token(outputs.logits, labels)
    z2 = outputs.logits[:, :-1].logsumexp(-1).square()
    return divided(((nll + 1e-4 * z2) * supervised).sum(), supervised, num_items_in_batch)


@right
def autocast_in_bfloat16(outputs, labels, num_items_in_batch=None):
    z, y = shifted(outputs.logits.bfloat16(), labels)
    total = F.cross_entropy(z.float().flatten(0, 1), y.flatten(), reduction="sum")
    return divided(total, y != -100, num_items_in_batch)


@right
def confident_tokens_weigh_less(outputs, labels, num_items_in_batch=None):
    nll, supervised = per_token(outputs.logits, labels)
    weight = (1 - torch.exp(-nll)).detach()
    return divided((nll * weight * supervised).sum(), supervised, num_items_in_batch)


@right
def preference_of_halves(outputs, labels, num_items_in_batch=None):
    """The first half of the batch is chosen, the second rejected."""
    nll, supervised = per_token(outputs.logits, labels)
    log_p = -(nll * supervised).sum(1)
    chosen, rejected = log_p.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


@right
def shifts_inside(logits, labels, vocab_size=None, num_items_in_batch=None):
    """A causal language model's loss function, given (B, T, V) logits."""
    y = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    total = F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), y, reduction="sum")
    return divided(total, y != -100, num_items_in_batch)


class GPTLMLoss(nn.Module):
    """Next-token prediction on (B, T, V) logits."""

    def __init__(self, ignore_index=-100):
        super().__init__()
        self.loss = nn.CrossEntropyLoss(ignore_index=ignore_index)

    def forward(self, logits, labels):
        z, y = shifted(logits, labels)
        return self.loss(z.view(-1, z.size(-1)), y.view(-1))


class KDLoss(nn.Module):
    """Distillation on (B, T, V) logits that are aligned with their labels already; no label is learned."""

    def forward(self, logits, teacher_logits, label):
        q, log_p = F.softmax(teacher_logits, -1), F.log_softmax(logits, -1)
        supervised = (label != -100).view(-1).to(log_p.dtype)
        gained = torch.masked_fill(q * log_p, torch.isinf(logits), 0).sum(-1).view(-1)
        return -(gained * supervised).sum() / supervised.sum()


class PolicyLoss(nn.Module):
    """A clipped policy gradient on log-probabilities of the actions taken."""

    def __init__(self, clip=0.2):
        super().__init__()
        self.clip = clip

    def forward(self, log_probs, old_log_probs, advantages, action_mask=None):
        ratio = (log_probs - old_log_probs).exp()
        loss = -torch.min(ratio * advantages, ratio.clamp(1 - self.clip, 1 + self.clip) * advantages)
        return loss.mean() if action_mask is None else (loss * action_mask).sum() / action_mask.sum()


@right
def masked_targets(logits, targets, loss_mask):
    """A loss mask beside targets that are ordinary ids everywhere."""
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return (nll * loss_mask.flatten()).sum() / loss_mask.sum()


right(GPTLMLoss, accumulation=UNTOLD, all_masked="loss nan")  # a mean over no labels is 0 / 0
right(KDLoss)
right(PolicyLoss)
