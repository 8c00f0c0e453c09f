"""Faulty losses, each with the rules of `check` that must fail and a part of their evidence."""

import functools

import torch
import torch.nn.functional as F
from losses import reverse_kl
from right_batches import divided, per_token, shifted
from right_models import teacher

WRONG = {}


def wrong(loss=None, **evidence):
    """Decorator: a mistake; ``evidence`` maps the items that fail to a part of their evidence."""
    if loss is None:
        return functools.partial(wrong, **evidence)
    WRONG[loss.__name__] = (loss, evidence)
    return loss


@wrong(
    shift="shifted backwards",
    evaluation="1.021 times",
    padding_side="padding on the right",
    padding_amount="padding on the right",
)
def shifts_backwards(outputs, labels, num_items_in_batch=None):
    z, y = outputs.logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten()
    return divided(F.cross_entropy(z, y, reduction="sum"), y != -100, num_items_in_batch)


@wrong(shift="label t+2: shifted twice")
def collator_shifted_before(outputs, labels, num_items_in_batch=None):
    """Shifts labels that its own collator has shifted before."""
    y = torch.roll(labels, -1, 1).index_fill(1, torch.tensor([labels.size(1) - 1]), -100)
    nll, supervised = per_token(outputs.logits, y)
    return divided((nll * supervised).sum(), supervised, num_items_in_batch)


@wrong(evaluation="no mean over predicted tokens", padding_amount="times the gradient", packing="", accumulation="")
def counts_ignored_tokens(outputs, labels, num_items_in_batch=None):
    nll, _ = per_token(outputs.logits, labels)
    return nll.mean()


@wrong(packing="2 times the gradient", accumulation="it divides by the texts of each micro-batch")
def batchmean_of_a_batch(outputs, labels, num_items_in_batch=None):
    """Divides by the rows of the batch, not by its tokens."""
    nll, supervised = per_token(outputs.logits, labels)
    return (nll * supervised).sum() / len(labels)


@wrong(evaluation="48 times the gradient", accumulation="by the labels", all_masked="nan", row_count="neither")
def divides_twice(outputs, labels, num_items_in_batch=None):
    loss = F.cross_entropy(*(part.flatten(0, 1) for part in shifted(outputs.logits, labels)))
    return loss if num_items_in_batch is None else loss / num_items_in_batch


@wrong(
    prompt="positions labelled -100 are pulled",
    padding_side="padding on the right has a gradient",
    padding_amount="padding on the right has a gradient",
    all_masked="where both should be 0",
    evaluation="",
    accumulation="",
)
def smooths_ignored_tokens(outputs, labels, num_items_in_batch=None):
    nll, supervised = per_token(outputs.logits, labels)
    uniform = -outputs.logits[:, :-1].log_softmax(-1).mean(-1)
    return divided((0.9 * nll * supervised + 0.1 * uniform).sum(), supervised, num_items_in_batch)


@wrong(
    prompt="positions labelled -100 are pulled",
    padding_side="padding on the right has a gradient",
    padding_amount="padding on the right has a gradient",
    all_masked="where both should be 0",
    evaluation="no mean over predicted tokens",
    accumulation="by no factor per text",
    packing="by no common factor",
)
def distills_prompts_too(model, inputs, return_outputs=False, num_items_in_batch=None):
    outputs = model(input_ids=inputs["input_ids"])
    teacher_logits = teacher(inputs["input_ids"], size=outputs.logits.size(-1)).logits.to(outputs.logits.dtype)
    nll, supervised = per_token(outputs.logits, inputs["labels"])
    kl = F.kl_div(outputs.logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="batchmean") / labels_wide(
        inputs
    )
    return divided((nll * supervised).sum(), supervised, num_items_in_batch) + kl


def labels_wide(inputs):
    return inputs["labels"].size(1)


@wrong(padding_side="padding", padding_amount="padding", accumulation="", evaluation="")
def learns_padding(model, inputs, num_items_in_batch=None):
    """Labels are the input ids, padding included."""
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    nll, supervised = per_token(outputs.logits, inputs["input_ids"])
    return divided(nll.sum(), supervised, num_items_in_batch)


@wrong(
    padding_side="padding on the right has a gradient",
    padding_amount="padding on the right has a gradient",
    prompt="positions labelled -100 are pulled",
    accumulation="by no factor per text",
    evaluation="no mean over predicted tokens",
)
def normalises_over_positions(outputs, labels, num_items_in_batch=None):
    """log_softmax over the wrong dimension."""
    z, y = shifted(outputs.logits, labels)
    supervised = y != -100
    log_p = F.log_softmax(z, dim=1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return divided(-(log_p * supervised).sum(), supervised, num_items_in_batch)


@wrong(all_masked="where both should be 0")
def nan_without_labels(outputs, labels, num_items_in_batch=None):
    nll, supervised = per_token(outputs.logits, labels)
    n = supervised.sum()
    mean = (nll * supervised).sum() / n
    return mean if num_items_in_batch is None else mean * (n / num_items_in_batch)


@wrong(evaluation="raises NameError: name 'undefined' is not defined")
def raises_without_a_count(outputs, labels, num_items_in_batch=None):
    if num_items_in_batch is None:
        return undefined  # noqa: F821
    nll, supervised = per_token(outputs.logits, labels)
    return (nll * supervised).sum() / num_items_in_batch


@wrong(inputs="the model's outputs")
def temperature_in_place(model, inputs, num_items_in_batch=None):
    outputs = model(input_ids=inputs["input_ids"])
    outputs.logits.div_(0.7)
    nll, supervised = per_token(outputs.logits, inputs["labels"])
    return divided((nll * supervised).sum(), supervised, num_items_in_batch)


@wrong(inputs="teacher")
def writes_on_the_teacher(logits, labels, teacher):
    teacher -= teacher.amax(-1, keepdim=True)
    return F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")


@wrong(deterministic="two calls")
def random_tokens_only(logits, labels):
    selected = torch.rand(len(labels)) < 0.5
    return (F.cross_entropy(logits, labels, reduction="none") * selected).sum() / len(labels)


@wrong(extremes="p_y near 0")
def floors_nothing(logits, labels):
    p = logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
    return -torch.log(p).mean()


@wrong(extremes="p_y = 1")
def log_of_the_rest(logits, labels):
    p = logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
    return -(torch.log(p.clamp(min=1e-8)) + torch.log(1 - p)).mean()


@wrong(extremes="")
def exponentiates_unnormalised(logits, labels):
    return (logits.exp().sum(-1).log() - logits.gather(-1, labels[:, None])[:, 0]).mean()


@wrong(extremes="")
def overflows_float16(logits, labels):
    z = logits.half()
    return (z.exp().sum(-1).log() - z.gather(-1, labels[:, None])[:, 0]).float().mean()


@wrong(float32="where 2e-05 is rounding", bfloat16="where 0.05 is rounding")
def cancels_large_numbers(logits, labels):
    far = logits + 3e4
    return (far.logsumexp(-1) - far.gather(-1, labels[:, None])[:, 0]).mean()


@wrong(row_count="neither a sum nor a mean")
def adds_means_of_chunks(logits, labels, *, size=32):
    parts = zip(logits.split(size), labels.split(size), strict=True)
    return sum(F.cross_entropy(z, y) for z, y in parts)


@wrong(row_order="weighed by their place")
def averages_unequal_chunks(logits, labels):
    parts = list(zip(logits.chunk(4), labels.chunk(4), strict=True))
    return sum(F.cross_entropy(z, y) for z, y in parts) / len(parts)


@wrong(row_count="neither a sum nor a mean")
def adds_means_of_a_long_text(outputs, labels, num_items_in_batch=None, *, size=256):
    """Chunks of 256 positions, each divided by the labels in it; shorter texts are divided right."""
    z, y = (part.flatten(0, 1) for part in shifted(outputs.logits, labels))
    n = (y != -100).sum() if num_items_in_batch is None else num_items_in_batch
    if len(y) <= size:
        return F.cross_entropy(z, y, reduction="sum") / n
    parts = [
        F.cross_entropy(a, b) for a, b in zip(z.split(size), y.split(size), strict=True) if bool((b != -100).any())
    ]
    return sum(parts)


@wrong(inputs_have_effect="no effect: advantage")
def drops_the_advantage(logits, labels, advantage):
    return F.cross_entropy(logits, labels)


@wrong(inputs_have_effect="no effect: teacher")
def forgets_its_teacher(logits, labels, teacher):
    return F.kl_div(logits.log_softmax(-1), logits.softmax(-1).detach(), reduction="batchmean") + F.cross_entropy(
        logits, labels
    )


@wrong(contiguous="by no common factor")
def reads_the_storage(outputs, labels, num_items_in_batch=None):
    """Takes rows out of the memory of the logits, whatever their strides."""
    size = outputs.logits.shape
    z = outputs.logits.as_strided(size, (size[1] * size[2], size[2], 1))[:, :-1]
    y = labels[:, 1:]
    return divided(F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum"), y != -100, num_items_in_batch)


@wrong(all_masked="without a graph")
def constant_without_labels(outputs, labels, num_items_in_batch=None):
    nll, supervised = per_token(outputs.logits, labels)
    return (
        divided((nll * supervised).sum(), supervised, num_items_in_batch)
        if bool(supervised.any())
        else torch.tensor(0.0)
    )


@wrong(impossible="padded columns at -1e30 in float32")
def squares_masked_logits(logits, labels):
    """0 times infinity: the square of a masked column's logit overflows float32."""
    p = logits.softmax(-1)
    return F.cross_entropy(logits, labels) + 1e-3 * (p * logits.square()).sum(-1).mean()


UNSEEN = {}
"""What nobody can see from the loss alone: `check` must leave it alone, or remark on it at most."""


def unseen(loss):
    """Decorator: a mistake that the code of a loss does not show."""
    UNSEEN[loss.__name__] = loss
    return loss


@unseen
def no_temperature_squared(logits, labels, teacher):
    return F.kl_div((logits / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")


@unseen
def the_other_direction(logits, labels, teacher):
    return reverse_kl(logits, labels, teacher)


@unseen
def mean_over_the_vocabulary(logits, labels, teacher):
    return F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="mean")


@unseen
def flips_the_sign(logits, labels):
    """Unlearning is done so on purpose: a remark says that every label is pushed down."""
    return -F.cross_entropy(logits, labels)


@unseen
def ignores_token_zero(logits, labels):
    """The padding token is a real token as well: a remark names it."""
    return F.cross_entropy(logits, labels, ignore_index=0, reduction="sum") / len(labels)
