"""Conformance: what an implementation of a loss must keep, a rule each."""

from qlens.conformance import accumulation, batches, rows  # noqa: F401  they fill RULES, in the order of the report
from qlens.conformance.rules import RULES, Failed, NotApplicable, Rule, sees_no_batches
from qlens.conformance.specimen import Specimen, first_line, specimen

__all__ = ["RULES", "Failed", "NotApplicable", "Rule", "Specimen", "first_line", "sees_no_batches", "specimen"]
