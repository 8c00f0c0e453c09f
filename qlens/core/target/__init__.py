"""Target: the distribution Q toward which a loss drives the model.

Read ``target`` (the class and its constructions), ``metrics`` (its figures per token), ``scaling`` (the same gradient at another
scale) and ``display`` (tables and plots).
"""

from qlens.core.target.scaling import Scale
from qlens.core.target.target import NO_PULLS, Target

__all__ = ["NO_PULLS", "Scale", "Target"]
