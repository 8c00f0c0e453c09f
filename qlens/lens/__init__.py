"""Lens: the target that any loss implies, Q = p - g, and everything that its gradient shows.

Read ``implied`` (implied_target) and ``explain``. ``explain`` takes a ``reading`` of the gradient with its ``rounding``
(``exact`` replaces casts by float64); ``gradient_analysis`` finds its parts (``decompose``), their formulas (``weights``)
and registered methods (``identify``); ``explanation`` holds the result and ``describe`` words it. ``equivalences``
compares all methods, ``gradient_flow`` integrates the gradient.
"""

from qlens.core.autograd import gradient
from qlens.lens.implied import implied_target

__all__ = ["gradient", "implied_target"]
