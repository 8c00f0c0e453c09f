"""Rules: what an implementation of a loss must keep, and how two of its gradients are compared.

A rule returns its evidence, raises Failed with it, or raises NotApplicable with the reason.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qlens.conformance.specimen import Reading, Specimen
from qlens.conformance.texts import VOCABULARY

ROWS_ONLY = "sees supervised rows only: who calls it masks, shifts and divides"

REACTING = 10  # tokens in each text on which shifts are found


class Failed(Exception):
    """A rule is broken; the message is the evidence."""


class NotApplicable(Exception):
    """A rule asks for what this loss has no part in; the message is the reason."""


class Rule(NamedTuple):
    """A rule: ``run`` returns its evidence; ``compares`` two calls, asks for (B, T) batches if ``laid_out``."""

    run: Callable[[Specimen], str]
    consequence: str
    compares: bool
    laid_out: bool


RULES: dict[str, Rule] = {}
"""Every rule by the id of its item, in the order they are reported."""


def rule(consequence: str, compares: bool = True, laid_out: bool = False) -> Callable:
    """Decorator: a rule whose item is named after its function."""

    def add(run: Callable[[Specimen], str]) -> Callable[[Specimen], str]:
        RULES[run.__name__] = Rule(run, consequence, compares, laid_out)
        return run

    return add


def sees_no_batches(loss: Specimen) -> str:
    """Why a loss is not shown (B, T) batches, or nothing."""
    if not loss.laid_out:
        return ROWS_ONLY
    return "compares pairs of texts: these batches hold none" if loss.scope == "pair" else ""


def relative(got: Tensor, wanted: Tensor) -> float:
    """max |got - wanted| as a share of max |wanted|; infinite where either is not finite."""
    off, size = float((got.double() - wanted.double()).abs().max()), float(wanted.abs().max())
    if not (off < float("inf") and size < float("inf")):
        return float("inf")
    return off / size if size else float(off > 0)


def to(off: float) -> str:
    """How near two things are, in words."""
    return f"to {off:.0e}" if off else "exactly"


def factor(loss: Specimen, got: Tensor, wanted: Tensor) -> float | None:
    """The one factor between two gradients, or None."""
    ratio = float((got * wanted).sum() / wanted.square().sum())
    return ratio if relative(got, ratio * wanted) <= loss.tolerance else None


def same(loss: Specimen, got: Reading, wanted: Reading, what: str) -> float:
    """How far two readings that should agree are apart, as a share of the largest gradient.

    Raises:
        Failed: further than rounding; the factor between them is named where there is one.
    """
    off = relative(got.grad, wanted.grad)
    if off <= loss.tolerance:
        return off
    times = factor(loss, got.grad, wanted.grad) if off < float("inf") else None
    if times is not None:
        raise Failed(f"{what}: {times:.4g} times the gradient")
    size = "not finite" if off == float("inf") else f"off by {off:.2g} of the largest entry, by no common factor"
    raise Failed(f"{what}: the gradient is {size}")


def reactions(loss: Specimen) -> list[tuple[int, int]]:
    """Which row's gradient turns most when a label is changed, one at a time: (label, row), counted over the batch.

    A row whose gradient only grows or shrinks has another weight, as in a sequence-weighted loss, but learns the same.
    Losses of batches see two texts of ``REACTING`` tokens without a prompt, any other a few rows.
    """
    if loss.laid_out:
        texts = [
            text._replace(labels=torch.cat([text.labels.new_tensor([1]), text.labels[1:]]))
            for text in loss.texts((REACTING - 1,) * 2, (1,))
        ]
        labels = torch.stack([text.labels for text in texts])

        def read(labels: Tensor) -> Tensor:
            shown = [text._replace(labels=row) for text, row in zip(texts, labels, strict=True)]
            return loss.read_batch(shown, 2 * REACTING - 2).grad
    else:
        tokens = loss.tokens()
        labels = tokens.labels

        def read(labels: Tensor) -> Tensor:
            return loss.read(tokens.replace(labels=labels)).grad

    base, found = read(labels), []
    for label in range(labels.numel()):
        changed = labels.flatten().clone()
        changed[label] = (changed[label] + 7) % VOCABULARY
        turned = _across(read(changed.view_as(labels)), base)
        if turned.max() > loss.tolerance * base.abs().max():
            found.append((label, int(turned.argmax())))
    return found


def _across(grad: Tensor, base: Tensor) -> Tensor:
    """The size of every row's part of ``grad`` at right angles to ``base``, (N,)."""
    along = (grad * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True)
    return (grad - torch.where(along.isfinite(), along, 0.0) * base).norm(dim=-1)
