"""Conformance: what an implementation of a loss must keep.

Read ``rules`` (a module per group), ``harness`` (a loss with batches to try it on) and ``report`` (qlens.check).
"""

from qlens.conformance import rules  # noqa: F401  it fills RULES
from qlens.conformance.harness import IncompleteGroup, Specimen
from qlens.conformance.open_loss import specimen
from qlens.conformance.rules.rule import RULES, Failed, NotApplicable, Remark, Rule, sees_no_batches

__all__ = [
    "RULES",
    "Failed",
    "IncompleteGroup",
    "NotApplicable",
    "Remark",
    "Rule",
    "Specimen",
    "sees_no_batches",
    "specimen",
]
