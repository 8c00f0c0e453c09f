"""Rules of conformance, a module per group; ``rule`` defines what a rule is."""

from qlens.conformance.rules import (  # noqa: F401  they register their rules
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
