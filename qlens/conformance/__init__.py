"""Conformance: what an implementation of a loss must keep, a rule each. Read rules, then specimen, then the rules by module."""

from qlens.conformance import (  # noqa: F401  they fill RULES
    accumulation,
    batches,
    dependence,
    effects,
    functions,
    manners,
    numerics,
    objectives,
    shift,
)
from qlens.conformance.opening import specimen
from qlens.conformance.rules import RULES, Failed, NotApplicable, Remark, Rule, sees_no_batches
from qlens.conformance.specimen import Specimen

__all__ = ["RULES", "Failed", "NotApplicable", "Remark", "Rule", "Specimen", "sees_no_batches", "specimen"]
