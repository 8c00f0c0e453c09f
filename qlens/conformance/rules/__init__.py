"""Rules: what an implementation of a loss must keep, a module per group of rules; ``rule`` says what a rule is."""

from qlens.conformance.rules import (  # noqa: F401  they fill RULES
    accumulation,
    batches,
    dependence,
    effects,
    functions,
    isolation,
    labels,
    numerics,
    shift,
)
