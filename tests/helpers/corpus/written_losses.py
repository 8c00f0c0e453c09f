"""Losses that are all SFT in different layouts, names, masks, return values and classes; and a distillation loss."""

import collections
import dataclasses
import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

ce = F.cross_entropy
V = 11


def nll(logits, labels):
    return -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def first_name(lm_logits, labels):
    return ce(lm_logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten())


def transposed(predictions, targets):
    batch, _, size = predictions.shape
    assert (batch, size) == (len(targets), V)
    return ce(predictions.transpose(1, 2), targets)


def shifts_inside_unreduced(logits, labels):
    return ce(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


def label_first(y_true, y_pred):
    return ce(y_pred, y_true)


def unknown_names(left, right):
    return ce(left, right)


def rows_by_mask(logits, labels, loss_mask):
    return (nll(logits, labels) * loss_mask).sum() / loss_mask.sum()


def batch_by_mask(logits, labels, response_mask):
    batch, width, _ = logits.shape
    assert response_mask.shape == (batch, width)
    return (nll(logits, labels) * response_mask).sum() / response_mask.sum()


def batch_by_shifted_mask(logits, labels, loss_mask):
    supervised = loss_mask[:, 1:]
    return (nll(logits[:, :-1], labels[:, 1:].clamp(min=0)) * supervised).sum() / supervised.sum()


def by_index(logits, labels, mask):
    return ce(logits[mask], labels[mask])


def padding_is_true(logits, labels, pad_mask):
    return ce(logits, labels, reduction="none").masked_fill(pad_mask.bool(), 0.0).sum() / (~pad_mask.bool()).sum()


def mean_over_masked_rows_too(logits, labels, mask):
    return (ce(logits, labels, reduction="none") * mask).mean()


def labels_are_ids(logits, input_ids, attention_mask):
    supervised = attention_mask[:, 1:]
    return (nll(logits[:, :-1], input_ids[:, 1:]) * supervised).sum() / supervised.sum()


def loss_function(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **kwargs):
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:] if shift_labels is None else shift_labels
    total = ce(logits.reshape(-1, vocab_size), labels.reshape(-1), reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def required_count(logits, labels, num_items_in_batch):
    return ce(logits, labels, reduction="sum") / num_items_in_batch


def by_text(outputs, labels):
    losses = ce(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


def by_batch_size(logits, labels):
    return ce(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum") / len(logits)


def label_log_probs_only(logprobs, mask):
    return -(logprobs * mask).sum() / mask.sum()


def all_log_probs(log_probs, target):
    return F.nll_loss(log_probs, target)


def weighted(logits, labels, token_weights):
    return (ce(logits, labels, reduction="none") * token_weights).sum() / len(labels)


def scale_of_swift(outputs, labels, loss_scale=None):
    losses = ce(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    losses = losses if loss_scale is None else losses * loss_scale[:, 1:].flatten()
    return losses.sum() / (labels[:, 1:] != -100).sum()


def inputs_by_attribute(net, batch):
    return net(input_ids=batch.input_ids, labels=batch["labels"]).loss


def twice(model, inputs, return_outputs=False):
    one, two = model(**inputs), model(**inputs)
    divergence = F.kl_div(
        one.logits.log_softmax(-1), two.logits.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return (one.loss + two.loss) / 2 + divergence


def twice_in_one_batch(model, inputs):
    logits = model(input_ids=torch.cat([inputs["input_ids"]] * 2)).logits
    return ce(logits[:, :-1].flatten(0, 1), torch.cat([inputs["labels"]] * 2)[:, 1:].flatten())


class Chunks(nn.Module):
    def __init__(self, parts=3):
        super().__init__()
        self.parts = parts

    def forward(self, logits, labels):
        parts = zip(logits.chunk(self.parts, 1), labels.chunk(self.parts, 1), strict=True)
        return sum(ce(z.flatten(0, 1), y.flatten(), reduction="sum") for z, y in parts) / (labels != -100).sum()


class Plugin:
    def __init__(self, args, trainer):
        self.args = args

    def __call__(self, outputs, labels, **kwargs):
        return ce(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@dataclasses.dataclass
class Unhashable:
    times: float = 1.0

    def __call__(self, logits, labels):
        return self.times * ce(logits, labels)


Named = collections.namedtuple("Named", "loss logits")


def distils(student_logits, teacher_logits, labels=None, temperature=1.0):
    if labels is not None:
        student_logits, teacher_logits = student_logits[labels != -100], teacher_logits[labels != -100]
    student, teacher = (student_logits / temperature).log_softmax(-1), (teacher_logits / temperature).softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean")


SFT = [
    first_name, transposed, shifts_inside_unreduced, label_first, unknown_names, rows_by_mask, batch_by_mask,
    batch_by_shifted_mask, by_index, padding_is_true, mean_over_masked_rows_too, labels_are_ids, loss_function,
    required_count, by_text, by_batch_size, label_log_probs_only, all_log_probs, weighted, scale_of_swift,
    inputs_by_attribute, twice, twice_in_one_batch, Chunks, Chunks(2), Plugin, Unhashable, Unhashable(),
    nn.CrossEntropyLoss, functools.partial(ce, reduction="sum"), lambda *both: ce(*both),
    lambda outputs, targets: ce(outputs, targets),
    lambda logits, labels: {"accuracy": logits.argmax(-1) == labels, "loss": ce(logits, labels)},
    lambda logits, labels: (ce(logits, labels), len(labels)),
    lambda logits, labels: Named(ce(logits, labels), logits),
    lambda logits, labels: SimpleNamespace(loss=ce(logits, labels)),
]  # fmt: skip
