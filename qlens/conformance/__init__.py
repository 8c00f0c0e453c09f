"""Conformance: rules that every implementation of a loss should keep, and the report on them.

Read ``rules`` (a module per group), ``harness`` (a loss with batches to try it on) and ``report`` (qlens.check).
"""

from qlens.conformance import rules  # noqa: F401  registers the rules
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
