"""Conformance: what an implementation of a loss must keep, a rule each. Read rules, then specimen, then the rules by module."""

from qlens.conformance import accumulation, batches, dependence, effects, manners, numerics, shift  # noqa: F401  they fill RULES
from qlens.conformance.opening import specimen
from qlens.conformance.rules import RULES, Failed, NotApplicable, Remark, Rule, sees_no_batches
from qlens.conformance.specimen import Specimen

__all__ = ["RULES", "Failed", "NotApplicable", "Remark", "Rule", "Specimen", "sees_no_batches", "specimen"]
