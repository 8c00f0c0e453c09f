"""Rules for losses that see (B, T) batches: padding, packing, and batches without a label."""

import contextlib
from collections.abc import Iterator

import torch

from qlens.conformance.harness import COUNT, Reading, Specimen
from qlens.conformance.rules.rule import Failed, NotApplicable, Remark, rule, same, to
from qlens.conformance.synthetic_batches import Text, count
from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE

BREAKS = "such a micro-batch (a long prompt cut off) breaks the run: weights turn NaN, backward raises, or ranks wait"


@rule("what is learned depends on the side a tokenizer pads", laid_out=True)
def padding_side(loss: Specimen) -> str:
    """Padding on the left or the right gives the same gradient."""
    if loss.labels_from_ids and not loss.counted:
        raise NotApplicable(
            "it takes its labels from input_ids: padded left, it counts the first token of a text as well"
        )
    texts = loss.unequal()
    offs = []
    for columns in (0, 7):
        right = _padded(loss, texts, "right", columns)
        with _first_tokens_counted(loss):
            left = _padded(loss, texts, "left", columns)
            offs.append(same(loss, left, right, f"padded left instead of right ({columns} further columns)"))
    return f"same gradient {to(max(offs))} on either side, none on padding"


@rule("what is learned depends on the longest text of a batch: short batches weigh more", laid_out=True)
def padding_amount(loss: Specimen) -> str:
    """Seven further columns of padding change nothing."""
    texts = loss.unequal()
    offs = []
    for side in ("right", "left"):
        with _first_tokens_counted(loss) if side == "left" else contextlib.nullcontext():
            none, more = (_padded(loss, texts, side, columns) for columns in (0, 7))
            offs.append(same(loss, more, none, f"7 further columns of padding on the {side}"))
    return f"same gradient {to(max(offs))} with 7 further columns, none on padding"


@rule("packed training weighs or pairs tokens otherwise than the same texts in rows of their own", laid_out=True)
def packing(loss: Specimen) -> str:
    """Two texts packed into a row give the gradient of two rows."""
    if loss.scope == "sequence":
        raise NotApplicable("scope sequence: rows of a batch are its texts")
    if loss.style.fields == "texts":
        raise NotApplicable("it takes one advantage, reward or weight for each row: two texts in a row have two")
    if loss.labels_from_ids:
        raise NotApplicable("it takes its labels from input_ids: it cannot know where a packed text begins")
    texts = loss.unequal()
    packed = [_joined(*texts[i : i + 2]) for i in range(0, len(texts), 2)]
    n = count(texts)
    what = "two texts in a row, against two rows"
    try:
        off = same(loss, loss.read_batch(packed, n), loss.read_batch(texts, n), what)
    except Failed as failure:
        if loss.attends:
            raise Remark(
                f"{failure}; it uses the attention mask, which hides no packed text's first token"
            ) from failure
        if loss.scope == "token":
            raise
        raise NotApplicable(f"scope batch: a token's gradient depends on the other texts ({failure})") from failure
    return f"two texts in a row give the gradient of two rows {to(off)}"


@rule(BREAKS, raising=BREAKS, compares=False, laid_out=True)
def all_masked(loss: Specimen) -> str:
    """A batch without labels gives a loss of zero with a graph."""
    texts = [
        text._replace(labels=torch.full_like(text.labels, IGNORE), tokens=text.tokens[:0])
        for text in loss.texts((5, 3, 4, 6))
    ]
    reading = loss.read_batch(texts, 48, attended=not loss.labels_from_ids)
    if not reading.graph:
        raise Failed("it returns a value without a graph: no gradient leads back to the logits")
    pull = float(torch.cat([reading.grad.flatten(), reading.grad.new_tensor([reading.outside])]).abs().max())
    if pull != 0 or not bool(reading.value.isfinite()):  # NaN is neither
        if loss.labels_from_ids:
            raise NotApplicable("it takes its labels from input_ids: no micro-batch is without any")
        logged = "the logged loss turns NaN, and with it every mean that it enters" if pull == 0 else ""
        raise Failed(f"loss {float(reading.value):.4g}, largest gradient {pull:.4g}, where both should be 0", logged)
    if float(reading.value) and loss.scope != "batch":
        raise Remark(f"gradient 0, but the loss is {float(reading.value):.4g}: it enters the logged loss")
    return f"loss {float(reading.value):.4g} with a graph, gradient 0{_in_evaluation(loss, texts)}"


@contextlib.contextmanager
def _first_tokens_counted(loss: Specimen) -> Iterator[None]:
    """Turn a failure on the left alone into a remark for losses of whole texts, whose padding learns a first token."""
    try:
        yield
    except Failed as failure:
        if not loss.labels_from_ids and loss.prompts:
            raise
        raise Remark(f"{failure}: the padding before a text learns its first token, or counts it") from failure


def _padded(loss: Specimen, texts: list[Text], side: str, columns: int) -> Reading:
    reading = loss.read_batch(texts, count(texts), side=side, columns=columns)
    if reading.outside > loss.nothing * float(reading.grad.abs().max()):
        share = reading.outside / float(reading.grad.abs().max())
        raise Failed(f"padding on the {side} has a gradient, up to {share:.2g} of the largest")
    return reading


def _joined(first: Text, second: Text) -> Text:
    """Two texts as one; the second's first label is -100, so that it is not learned."""
    fields = {k: torch.cat([v, getattr(second.tokens, k)]) for k, v in first.tokens.fields().items()}
    parts = [torch.cat([getattr(first, name), getattr(second, name)]) for name in ("logits", "labels", "ids")]
    return Text(*parts, first.tokens.replace(**fields))


def _in_evaluation(loss: Specimen, texts: list[Text]) -> str:
    """A remark where a batch without labels is not zero in evaluation; else ""."""
    if not loss.counted:
        return ""
    try:
        alone = float(loss.read_batch(texts, None, attended=not loss.labels_from_ids).value)
    except InputError as error:  # reported, but the rule is about training
        return f" (without {COUNT}: {error})"
    return f" (without {COUNT}, as in evaluation, it is {alone})" if alone else ""
