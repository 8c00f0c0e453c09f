"""Lens: the target that any loss implies, Q = p - g, and what it says about the loss.

Read ``implied`` (implied_target) and ``explain``; ``explain`` takes a ``reading`` of the gradient with its
``rounding``, ``findings`` gathers what is found in it: parts (``decompose``), their formulas (``weights``), registered
methods (``identify``). ``explanation``, ``summary`` and ``wording`` print it; ``exact`` reads losses that cast in
float64. ``equivalences`` compares all methods, ``gradient_flow`` integrates the gradient.
"""

from qlens.core.autograd import gradient
from qlens.lens.implied import implied_target

__all__ = ["gradient", "implied_target"]
