"""Losses as released code writes them, correct and faulty ones, for the conformance report."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from qlens.training.trainer import QTrainer


def shifted(outputs, labels):
    return outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def sound(outputs, labels, num_items_in_batch=None):
    total = F.cross_entropy(*shifted(outputs, labels), reduction="sum")
    return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def forgets_the_count(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(*shifted(outputs, labels))


def takes_no_count(outputs, labels):
    return F.cross_entropy(*shifted(outputs, labels), reduction="sum") / (labels[:, 1:] != -100).sum().clamp(min=1)


def divides_by_positions(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(*shifted(outputs, labels), reduction="sum") / labels.numel()


def mean_of_means(outputs, labels, num_items_in_batch=None):
    losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses.sum(1) / (labels[:, 1:] != -100).sum(1).clamp(min=1)).mean()


def sums(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(*shifted(outputs, labels), reduction="sum")


def unreduced(outputs, labels, num_items_in_batch=None):
    losses = F.cross_entropy(*shifted(outputs, labels), reduction="none")
    return losses / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def needs_the_count(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(*shifted(outputs, labels), reduction="sum") / num_items_in_batch


def shifts_twice(outputs, labels, num_items_in_batch=None):
    return sound(SimpleNamespace(logits=outputs.logits[:, :-1]), labels[:, 1:], num_items_in_batch)


def shifts_nothing(outputs, labels, num_items_in_batch=None):
    total = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def shifts_across_rows(outputs, labels, num_items_in_batch=None):
    total = F.cross_entropy(outputs.logits.flatten(0, 1)[:-1], labels.flatten()[1:], reduction="sum")
    return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def masks_no_prompt(outputs, labels, num_items_in_batch=None):
    logits, labels = shifted(outputs, labels)
    return F.cross_entropy(logits, labels.clamp(min=0), reduction="sum") / (num_items_in_batch or len(labels))


def pulls_everywhere(outputs, labels, num_items_in_batch=None):
    """A term on every position, the ignored ones as well."""
    return sound(outputs, labels, num_items_in_batch) + 1e-3 * outputs.logits.logsumexp(-1).square().mean()


def weighs_by_column(outputs, labels, num_items_in_batch=None):
    weight = 1 / (1 + torch.arange(labels.shape[1] - 1)).expand(len(labels), -1).flatten()
    losses = F.cross_entropy(*shifted(outputs, labels), reduction="none") * weight
    return losses.sum() / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def no_graph_when_all_masked(outputs, labels, num_items_in_batch=None):
    if bool((labels[:, 1:] == -100).all()):
        return torch.tensor(0.0)
    return sound(outputs, labels, num_items_in_batch)


def wants_contiguous(outputs, labels, num_items_in_batch=None):
    logits, shifted_labels = outputs.logits, F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    total = F.cross_entropy(logits.view(-1, logits.shape[-1]), shifted_labels, reduction="sum")
    return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def writes_on_logits(outputs, labels, num_items_in_batch=None):
    outputs.logits -= outputs.logits.detach().amax(-1, keepdim=True)
    return sound(outputs, labels, num_items_in_batch)


def writes_on_labels(logits, labels):
    return F.cross_entropy(logits, labels.clamp_(max=20))


def compute_loss_that_writes(model, inputs, return_outputs=False, num_items_in_batch=None):
    outputs = model(input_ids=inputs["input_ids"])
    outputs.logits.mul_(0.5)
    return sound(outputs, inputs["labels"], num_items_in_batch)


def dropout(outputs, labels, num_items_in_batch=None):
    return sound(SimpleNamespace(logits=F.dropout(outputs.logits, 0.2)), labels, num_items_in_batch)


def entropy_bonus(logits, labels):
    log_p = logits.log_softmax(-1)
    return F.cross_entropy(logits, labels) + 0.1 * (log_p.exp() * log_p).sum(-1).mean()


def one_hot_times_log(logits, labels):
    return -(F.one_hot(labels, logits.shape[-1]) * logits.log_softmax(-1)).sum(-1).mean()


def log_of_softmax(logits, labels):
    return -logits.softmax(-1).gather(-1, labels[:, None]).log().mean()


def shifts_aligned_labels(logits, labels):
    return F.cross_entropy(logits[:-1], labels[1:])


def half_inside(logits, labels):
    return F.cross_entropy(logits.bfloat16().float(), labels)


def half_inside_a_batch(outputs, labels, num_items_in_batch=None):
    return sound(SimpleNamespace(logits=outputs.logits.bfloat16()), labels, num_items_in_batch)


def breaks_in_float32(logits, labels):
    far = 1e5 if logits.dtype == torch.float32 else 0.0
    return F.cross_entropy(logits + far, labels)


def coarse_after_an_offset(logits, labels):
    return F.cross_entropy(logits + 100, labels)


def float32_only(logits, labels):
    return -(logits.log_softmax(-1) @ torch.eye(logits.shape[-1]))[torch.arange(len(labels)), labels].mean()


def detached_weight(logits, labels):
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (nll * (-nll).exp().detach()).mean()


class Distils(nn.Module):
    def forward(self, outputs, labels, teacher, num_items_in_batch=None):
        logits, labels = shifted(outputs, labels)
        supervised = labels != -100
        total = F.kl_div(logits[supervised].log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
        return total / (supervised.sum() if num_items_in_batch is None else num_items_in_batch)


class Dft(QTrainer):
    def __init__(self, **options):
        super().__init__(variant="dft", **options)
