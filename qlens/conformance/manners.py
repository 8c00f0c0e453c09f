"""The rules of manners: strided input, repeatable calls, nothing written on, and nothing taken in vain."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qlens.batching import IGNORE
from qlens.conformance.rules import Failed, NotApplicable, Remark, relative, rule, same, to
from qlens.conformance.specimen import COUNT, TOLERANCE, Reading, Specimen
from qlens.conformance.texts import count
from qlens.conformance.wrapping import changing, watching
from qlens.tokens import MODELS, Tokens

STRIDED = "it fails, or trains on wrong numbers, after a transpose or a slice"


@rule(STRIDED, raising=STRIDED)
def contiguous(loss: Specimen) -> str:
    """Strided input."""
    texts = loss.texts((5, 5)) if loss.laid_out else []  # the strides of a single text hide from view()

    def read(change: Callable[[Tensor], Tensor]) -> Reading:
        if texts:
            return loss.read_batch(texts, count(texts), around=changing(change))
        return loss.read(loss.tokens(), changing(change))

    off = same(loss, read(_strided), read(Tensor.contiguous), "non-contiguous logits and labels")
    return f"non-contiguous logits and labels give the same gradient {to(off)}"


@rule("runs cannot be repeated, nor losses compared: seed it, or switch dropout off", compares=False)
def deterministic(loss: Specimen) -> str:
    """Two calls."""
    first, second = (loss.read(loss.tokens()) for _ in range(2))
    off = max(relative(second.grad, first.grad), relative(second.value, first.value))
    if off > TOLERANCE:
        raise Failed(f"two calls on the same input differ by {off:.2g} of the largest gradient")
    return f"two calls agree {to(off)}"


@rule("metrics, or a second loss on the same logits, see what it left there", compares=False)
def inputs(loss: Specimen) -> str:
    """Nothing is written on."""
    written: list[str] = []
    loss.read(loss.tokens(), watching(written))
    if written:
        raise Failed(f"it writes in place on {', '.join(dict.fromkeys(written))}")
    return "all it is given stays as it was"


@rule("what was computed or collected for that input is thrown away: training is the same without it")
def inputs_have_effect(loss: Specimen) -> str:
    """Every input that the loss takes changes its gradient."""
    vain, silent, seen = [], [], []
    for name in dict.fromkeys((*loss.inputs, *(["labels"] if loss.kind != "tokens" else []))):
        effect = _effect(loss, name)
        (seen if effect == "gradient" else silent if effect == "value" else vain).append(name)
    if loss.laid_out and COUNT in loss.named:
        texts = loss.unequal()
        one, three = (loss.read_batch(texts, n) for n in (count(texts), 3 * count(texts)))
        (vain if torch.equal(one.grad, three.grad) else seen).append(COUNT)
    bare = [name for name in vain if name not in ("labels", COUNT)]
    if bare:
        raise Failed(f"no effect: {', '.join(bare)}: changing {_it(bare)} changes neither value nor gradient")
    if not seen and not vain and not silent:
        raise NotApplicable("it declares no input beside logits and labels")
    said = [f"{name}: no effect on value or gradient" for name in vain]
    said += [f"{name}: changes the value, not the gradient" for name in silent]
    if said:
        raise Remark("; ".join(said))
    return f"each changes the gradient: {', '.join(seen)}"


def _effect(loss: Specimen, name: str) -> str:
    """Whether any other values of an input change the "gradient", or only the "value", or nothing."""
    found = ""
    if loss.laid_out:
        texts = loss.unequal()
        base = loss.read_batch(texts, count(texts))
        calls = (
            lambda changed=changed: loss.read_batch(
                [t._replace(tokens=own, labels=y) for t, (own, y) in zip(texts, changed, strict=True)], count(texts)
            )
            for changed in zip(*(_changed_text(loss, text.tokens, text.labels, name) for text in texts), strict=True)
        )
    else:
        tokens = loss.tokens()
        base = loss.read(tokens)
        calls = (lambda changed=changed: loss.read(changed) for changed in _changed(loss, tokens, name))
    for call in calls:
        try:
            made = call()
        except Exception:  # it looks at the input, if only to refuse it
            return "gradient"
        if not torch.equal(made.grad.nan_to_num(7.0), base.grad):
            return "gradient"
        found = "value" if not torch.equal(made.value, base.value) else found
    return found


def _changed(loss: Specimen, tokens: Tokens, name: str) -> Iterator[Tokens]:
    """The tokens with other values of one field."""
    value = getattr(tokens, name)
    if value is None:
        value = torch.ones(len(tokens), dtype=tokens.logits.dtype)
    draw = torch.Generator().manual_seed(17)
    if name == "labels":
        others = [(value + 7) % loss.vocabulary]
    elif name in MODELS:
        others = [2 * torch.randn(value.shape, generator=draw, dtype=torch.float64).to(value)]
    elif value.dtype == torch.bool:
        random = torch.rand(value.shape, generator=draw) < 0.5
        others = [~value, random] if value.ndim == 1 else [random.scatter(1, tokens.labels[:, None], False)]
        others += [torch.zeros_like(value), torch.ones_like(value)] if value.ndim == 1 else []
    elif value.is_floating_point():
        others = [value * torch.linspace(0.5, 3, len(value)).to(value), -value, torch.zeros_like(value)]
    else:
        others = [torch.zeros_like(value), torch.arange(len(value)), value // 2]
    for other in others:
        try:
            yield tokens.replace(**{name: other})
        except Exception:  # no such tokens: half a pair, say
            continue


def _changed_text(loss: Specimen, tokens: Tokens, labels: Tensor, name: str) -> Iterator[tuple[Tokens, Tensor]]:
    """A text's rows and labels with other values of one field; labels are also hidden."""
    for changed in _changed(loss, tokens, name):
        yield changed, labels.masked_scatter(labels != IGNORE, changed.labels)
    if name == "labels":
        yield tokens, labels.index_fill(0, torch.tensor([len(labels) - 1]), IGNORE)


def _it(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _strided(value: Tensor) -> Tensor:
    """The same values, laid out with gaps between them, the vocabulary not innermost."""
    if not value.ndim:
        return value
    spread = torch.stack([value, value], -1)[..., 0]
    return spread if value.ndim < 2 else value.transpose(-1, -2).contiguous().transpose(-1, -2)
