"""Rules for losses that see (B, T) batches: accumulation, evaluation, padding, packing, masks."""

import torch
from torch import Tensor

from qlens.batching import IGNORE
from qlens.conformance.rules import Failed, NotApplicable, reactions, relative, rule, same, to
from qlens.conformance.specimen import COUNT, Reading, Specimen
from qlens.conformance.texts import PROMPTS, UNEQUAL, Text, count


@rule("evaluation losses of different batches cannot be averaged, nor compared with the training loss", laid_out=True)
def evaluation(loss: Specimen) -> str:
    """Without a count: the mean over predicted tokens."""
    texts = loss.texts(UNEQUAL, PROMPTS)
    n = count(texts)
    alone = loss.read_batch(texts, None)
    if alone.shape:
        raise Failed(f"returns shape {alone.shape}: a trainer's backward needs one number")
    if not bool(alone.value.isfinite()):
        raise Failed(f"without {COUNT} the loss is {float(alone.value)}")
    if loss.counted:
        told = loss.read_batch(texts, n)
        same(loss, alone, told, f"without {COUNT}, against the call that says {n}")
        if relative(alone.value, told.value) > loss.tolerance:
            raise Failed(f"the loss is {alone.value:.6g} without {COUNT}, {told.value:.6g} with {n}")
    if loss.scope in ("batch", "sequence"):
        return f"{alone.value:.4g}, finite (scope {loss.scope}: its mean over tokens is not asked for)"
    mean = sum(count([text]) * loss.read_batch([text], None).value for text in texts) / n
    if relative(alone.value, mean) > loss.tolerance:
        times = float(loss.read_batch([*texts, *texts], None).value / alone.value)
        kind = "a sum, no mean" if abs(times - 2) <= loss.tolerance else "no mean over predicted tokens"
        raise Failed(
            f"{kind}: the batch gives {alone.value:.6g}, its texts alone a token mean of {mean:.6g}; "
            f"every text twice gives {times:.4g} times the loss"
        )
    counted = f", as with the count {n}" if loss.counted else ""
    return f"without {COUNT} the mean over predicted tokens{counted}"


@rule("what is learned depends on the side a tokenizer pads", laid_out=True)
def padding_side(loss: Specimen) -> str:
    """Left or right."""
    texts = loss.texts(UNEQUAL, PROMPTS)
    offs = []
    for columns in (0, 7):
        right, left = (_padded(loss, texts, side, columns) for side in ("right", "left"))
        offs.append(same(loss, left, right, f"padded left instead of right ({columns} further columns)"))
    return f"same gradient {to(max(offs))} on either side, none on padding"


@rule("what is learned depends on the longest text of a batch: short batches weigh more", laid_out=True)
def padding_amount(loss: Specimen) -> str:
    """Seven further columns."""
    texts = loss.texts(UNEQUAL, PROMPTS)
    offs = []
    for side in ("right", "left"):
        none, more = (_padded(loss, texts, side, columns) for columns in (0, 7))
        offs.append(same(loss, more, none, f"7 further columns of padding on the {side}"))
    return f"same gradient {to(max(offs))} with 7 further columns, none on padding"


@rule("packed training weighs or pairs tokens otherwise than the same texts in rows of their own", laid_out=True)
def packing(loss: Specimen) -> str:
    """Two texts in a row."""
    if loss.scope == "sequence":
        raise NotApplicable("scope sequence: rows of a batch are its texts")
    texts = loss.texts(UNEQUAL, PROMPTS)
    packed = [_joined(*texts[i : i + 2]) for i in range(0, len(texts), 2)]
    n = count(texts)
    off = same(loss, loss.read_batch(packed, n), loss.read_batch(texts, n), "two texts in a row, against two rows")
    return f"two texts in a row give the gradient of two rows {to(off)}"


@rule(
    "such a micro-batch (a long prompt cut off) breaks the run: weights turn NaN, backward raises, or ranks wait",
    compares=False,
    laid_out=True,
)
def all_masked(loss: Specimen) -> str:
    """Nothing to learn: zero, with a graph."""
    texts = [
        text._replace(labels=torch.full_like(text.labels, IGNORE), tokens=text.tokens[:0])
        for text in loss.texts((5, 3))
    ]
    made = loss.read_batch(texts, 48)
    pull = float(torch.cat([made.grad.flatten(), made.grad.new_tensor([made.outside])]).abs().max())
    if float(made.value) or pull != 0:  # NaN is neither
        raise Failed(f"loss {float(made.value):.4g}, largest gradient {pull:.4g}, where both should be 0")
    return f"loss 0 with a graph, gradient 0{_in_evaluation(loss, texts)}"


@rule("prompts, or other tokens meant to be ignored, are trained on", laid_out=True)
def prompt(loss: Specimen) -> str:
    """-100 is ignored."""
    texts = loss.texts(UNEQUAL, PROMPTS)
    made = loss.read_batch(texts, count(texts), attended=True)
    offsets = {label - row for label, row in reactions(loss)} or {1}  # a wrong shift is another rule's finding
    masked = torch.cat([_masked(text.labels, min(offsets)) for text in texts])
    pulled = made.grad[masked].abs().amax(-1)
    many = int((pulled > 1e-12 * made.grad.abs().max()).sum())
    if many:
        share = float(pulled.max() / made.grad.abs().max())
        raise Failed(f"{many} of {len(pulled)} positions labelled -100 are pulled, by up to {share:.2g} of the largest")
    return f"no gradient on {len(pulled)} positions labelled -100"


def _padded(loss: Specimen, texts: list[Text], side: str, columns: int) -> Reading:
    made = loss.read_batch(texts, count(texts), side=side, columns=columns)
    if made.outside > 1e-12 * float(made.grad.abs().max()):
        share = made.outside / float(made.grad.abs().max())
        raise Failed(f"padding on the {side} has a gradient, up to {share:.2g} of the largest")
    return made


def _joined(first: Text, second: Text) -> Text:
    """Two texts as one; the second's first label is -100, so that nothing learns it."""
    fields = {k: torch.cat([v, getattr(second.tokens, k)]) for k, v in first.tokens.fields().items()}
    tokens = first.tokens.replace(**fields)
    return Text(torch.cat([first.logits, second.logits]), torch.cat([first.labels, second.labels]), tokens)


def _masked(labels: Tensor, offset: int) -> Tensor:
    """The positions whose label, ``offset`` on, is -100 or beyond the text."""
    shifted = torch.full_like(labels, IGNORE)
    at = torch.arange(len(labels)) + offset
    inside = (at >= 0) & (at < len(labels))
    shifted[inside] = labels[at[inside]]
    return shifted == IGNORE


def _in_evaluation(loss: Specimen, texts: list[Text]) -> str:
    """A remark where a batch without labels is no zero to an evaluation."""
    if not loss.counted:
        return ""
    try:
        alone = float(loss.read_batch(texts, None).value)
    except Exception as error:  # reported, but the rule is about training
        return f" (without {COUNT} it raises {type(error).__name__})"
    return f" (without {COUNT}, as in evaluation, it is {alone})" if alone else ""
