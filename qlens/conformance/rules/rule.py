"""Rule: the registry of rules, their outcomes, and the comparison of two gradients.

A rule returns its evidence, or raises Failed (a fault of the code), Remark (worth knowing, no fault) or NotApplicable.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from qlens.conformance.harness import Reading, Specimen

ROWS_ONLY = "sees supervised rows only: the caller masks, shifts and divides"


class Failed(Exception):
    """A rule is broken; the message is the evidence, ``consequence`` overrides that of the rule."""

    def __init__(self, evidence: str, consequence: str = ""):
        super().__init__(evidence)
        self.consequence = consequence


class Remark(Exception):
    """Something worth knowing for training that is no fault of the code."""


class NotApplicable(Exception):
    """A rule that does not concern this loss; the message is the reason."""


class Rule(NamedTuple):
    """A rule of the report.

    Args:
        run: the test, which returns its evidence.
        consequence: effect of a failure on training.
        raising: effect where the loss raises an exception under the test.
        compares: whether it compares two calls, which a random loss does not allow.
        laid_out: whether it needs (B, T) batches.
    """

    run: Callable[[Specimen], str]
    consequence: str
    raising: str
    compares: bool
    laid_out: bool


RULES: dict[str, Rule] = {}
"""Every rule by the id of its item, in the order of the report."""


def rule(consequence: str, raising: str = "", compares: bool = True, laid_out: bool = False) -> Callable:
    """Register a test as a rule named after its function."""

    def add(run: Callable[[Specimen], str]) -> Callable[[Specimen], str]:
        RULES[run.__name__] = Rule(run, consequence, raising, compares, laid_out)
        return run

    return add


def sees_no_batches(loss: Specimen) -> str:
    """Why a loss is not tested on (B, T) batches; "" if it is."""
    if not loss.laid_out:
        return ROWS_ONLY
    return "compares pairs of texts: these batches hold none" if loss.declared == "pair" else ""


def relative(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| as a share of max |expected|; infinite where either is not finite."""
    off, size = float((actual.double() - expected.double()).abs().max()), float(expected.abs().max())
    if not (off < float("inf") and size < float("inf")):
        return float("inf")
    return off / size if size else float(off > 0)


def to(off: float) -> str:
    """A relative difference in words."""
    return f"to {off:.0e}" if off else "exactly"


def factor(loss: Specimen, actual: Tensor, expected: Tensor) -> float | None:
    """The factor between two proportional gradients; None if they are not."""
    size = expected.square().sum()
    if not bool(size):
        return None
    ratio = float((actual * expected).sum() / size)
    return ratio if relative(actual, ratio * expected) <= loss.tolerance else None


def same(loss: Specimen, actual: Reading, expected: Reading, what: str) -> float:
    """The difference of two readings that should be equal, as a share of the largest gradient.

    Raises:
        Failed: it is more than rounding; the message names the factor between them if there is one.
    """
    off = relative(actual.grad, expected.grad)
    if off <= loss.tolerance:
        return off
    times = factor(loss, actual.grad, expected.grad) if off < float("inf") else None
    if times is not None:
        raise Failed(f"{what}: {times:.4g} times the gradient")
    size = "not finite" if off == float("inf") else f"off by {off:.2g} of the largest entry, by no common factor"
    raise Failed(f"{what}: the gradient is {size}")
