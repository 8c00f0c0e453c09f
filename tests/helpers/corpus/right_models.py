"""Correct losses that run the model themselves, as a Trainer's compute_loss does; added to RIGHT."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from right_batches import divided, per_token, shifted
from right_losses import right
from torch import nn


@right
def model_computes_it(model, inputs, return_outputs=False, num_items_in_batch=None):
    outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
    return (outputs.loss, outputs) if return_outputs else outputs.loss


@right
def popped_labels(model, inputs, return_outputs=False, num_items_in_batch=None):
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    nll, supervised = per_token(outputs.logits, labels)
    loss = divided((nll * supervised).sum(), supervised, num_items_in_batch)
    return (loss, outputs) if return_outputs else loss


class Teacher(nn.Module):
    """Another model, reached through the closure of a loss: it looks at the input ids alone."""

    def forward(self, input_ids, attention_mask=None, size=24):
        entry = torch.arange(size, dtype=torch.float64)
        return SimpleNamespace(logits=2 * torch.cos(input_ids[..., None] * 0.9 + entry * 1.7))


teacher = Teacher().eval()


@right
def distills_from_its_closure(model, inputs, return_outputs=False, num_items_in_batch=None, *, temperature=2.0):
    labels = inputs["labels"]
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with torch.no_grad():
        teacher_logits = teacher(inputs["input_ids"], size=outputs.logits.size(-1)).logits.to(outputs.logits.dtype)
    s, y = shifted(outputs.logits / temperature, labels)
    t, supervised = teacher_logits[:, :-1] / temperature, y != -100
    kl = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1)
    loss = temperature**2 * divided((kl * supervised).sum(), supervised, num_items_in_batch)
    return (loss, outputs) if return_outputs else loss


@right
def distills_and_learns(model, inputs, return_outputs=False, num_items_in_batch=None):
    outputs = model(input_ids=inputs["input_ids"])
    with torch.no_grad():
        teacher_logits = teacher(inputs["input_ids"], size=outputs.logits.size(-1)).logits.to(outputs.logits.dtype)
    nll, supervised = per_token(outputs.logits, inputs["labels"])
    s, t = outputs.logits[:, :-1].log_softmax(-1), teacher_logits[:, :-1].log_softmax(-1)
    kl = (t.exp() * (t - s)).sum(-1)
    return divided(((0.5 * nll + 0.5 * kl) * supervised).sum(), supervised, num_items_in_batch)


@right
def teacher_in_the_inputs(model, inputs, num_items_in_batch=None):
    teacher_logits, labels = inputs.pop("teacher_logits"), inputs.pop("labels")
    outputs, supervised = model(**inputs), labels[:, 1:] != -100
    kl = F.kl_div(outputs.logits[:, :-1].log_softmax(-1), teacher_logits[:, :-1].softmax(-1), reduction="none").sum(-1)
    return divided((kl * supervised).sum(), supervised, num_items_in_batch)


@right
def masked_by_attention(model, inputs, return_outputs=False, num_items_in_batch=None):
    """Language modelling of whole texts: labels are the input ids, padding is told by the attention mask."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    outputs = model(input_ids=ids, attention_mask=mask)
    nll, supervised = per_token(outputs.logits, labels)
    loss = divided((nll * supervised).sum(), supervised, num_items_in_batch)
    return (loss, outputs) if return_outputs else loss


@right(accumulation="2x4 gives 2 and 8x1 8 times")
def means_over_attention(model, inputs, num_items_in_batch=None):
    """As it is written most often: labels are the input ids, and the mean is over what is attended."""
    mask = inputs["attention_mask"][:, 1:]
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    nll, _ = per_token(outputs.logits, inputs["input_ids"])
    return (nll * mask).sum() / mask.sum()


@right
def two_passes(model, inputs, num_items_in_batch=None):
    """R-Drop: two passes with dropout, drawn together; a model without dropout gives the same twice."""
    first, second = (model(input_ids=inputs["input_ids"]).logits for _ in range(2))
    nll, supervised = per_token(first, inputs["labels"])
    second_nll, _ = per_token(second, inputs["labels"])
    a, b = first[:, :-1].log_softmax(-1), second[:, :-1].log_softmax(-1)
    divergence = (
        F.kl_div(a, b, reduction="none", log_target=True) + F.kl_div(b, a, reduction="none", log_target=True)
    ).sum(-1)
    return divided(((0.5 * (nll + second_nll) + 0.5 * divergence) * supervised).sum(), supervised, num_items_in_batch)
