"""Coupling: what a token's gradient depends on in a batch, by changing the logits and labels of other tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlens.conformance.synthetic_batches import Text, count, relabelled
from qlens.core.supervised import IGNORE
from qlens.core.tokens import MODELS, Tokens

if TYPE_CHECKING:
    from qlens.conformance.harness import Specimen


def coupling(loss: "Specimen") -> str:
    """ "batch" where a text's gradient depends on the other texts, "sequence" where a token's depends on its text, or "token"."""
    texts = loss.unequal()
    base = _by_text(loss, texts, texts)
    for which in (0, len(texts) // 2, len(texts) - 1):
        text = texts[which]
        for changed in (_moved(text, slice(None)), _relabelled(text, loss.vocabulary), _other_inputs(text)):
            after = _by_text(loss, [*texts[:which], changed, *texts[which + 1 :]], texts)
            if _differ(loss, after, base, lambda other, which=which: other != which):
                return "batch"
    last = texts[-1]
    first = int((last.labels != IGNORE).nonzero()[0])
    row, labels = len(last.labels) - 2, last.labels.clone()
    labels[first] = (labels[first] + 7) % loss.vocabulary
    for changed, rest in (
        (_moved(last, slice(row, row + 1)), slice(0, row)),
        (relabelled(last, labels), slice(first, None)),
    ):  # the logits of the last row, then the first label: who learns a label stands before it
        after = _by_text(loss, [*texts[:-1], changed], texts)
        if _far(loss, after[-1][rest], base[-1][rest], base):
            return "sequence"
    return "sequence" if _divides_by_length(loss, texts, base) else "token"


def _divides_by_length(loss: "Specimen", texts: list[Text], base: list[Tensor]) -> bool:
    """Whether a label fewer makes the other tokens of its own text weigh more, and those of other texts not so."""
    last = texts[-1]
    labels = last.labels.index_fill(0, torch.tensor([len(last.labels) - 1]), IGNORE)
    fewer = last._replace(labels=labels, tokens=last.tokens[:-1])
    after = _by_text(loss, [*texts[:-1], fewer], texts)
    own, other = ((after[i] * base[i]).sum(-1) / base[i].square().sum(-1) for i in (-1, -2))
    own, other = (factors[factors.isfinite()].median() for factors in (own, other))
    return bool((own - other).abs() > max(loss.tolerance, 1e-3))


def _by_text(loss: "Specimen", texts: list[Text], like: list[Text]) -> list[Tensor]:
    grad = loss.read_batch(texts, count(like)).grad
    return list(grad.split([len(text.labels) for text in texts]))


def _differ(loss: "Specimen", actual: list[Tensor], base: list[Tensor], among: Callable[[int], bool]) -> bool:
    return any(_far(loss, actual[i], base[i], base) for i in range(len(base)) if among(i))


def _far(loss: "Specimen", actual: Tensor, expected: Tensor, base: list[Tensor]) -> bool:
    off = float((actual - expected).abs().max())
    return not off <= loss.tolerance * max(float(each.abs().max()) for each in base)


def _moved(text: Text, rows: slice) -> Text:
    """The text with other logits at some rows."""
    logits = text.logits.clone()
    draw = torch.Generator().manual_seed(5)
    noise = 2 * torch.randn(logits[rows].shape, generator=draw, dtype=torch.float64)
    logits[rows] += noise.to(logits)
    return text._replace(logits=logits)


def _relabelled(text: Text, vocabulary: int) -> Text:
    """The text with other labels; input ids stay, so that another model sees the same."""
    return relabelled(text, torch.where(text.labels == IGNORE, IGNORE, (text.labels + 7) % vocabulary))


def _other_inputs(text: Text) -> Text:
    """The text with other per-token inputs that are numbers or masks."""
    return text._replace(tokens=other_inputs(text.tokens))


def other_inputs(tokens: Tokens) -> Tokens:
    """Tokens with other weights, advantages and masks, the models as they were."""
    changed = {}
    for name, value in tokens.fields().items():
        if value.is_floating_point() and name not in ("logits", *MODELS):
            changed[name] = value * torch.linspace(0.5, 3, len(value)).to(value)
        elif value.dtype == torch.bool and name != "negatives":
            changed[name] = ~value
    return tokens.replace(**changed)
