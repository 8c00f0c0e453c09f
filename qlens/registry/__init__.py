"""Registry: methods by name, and variants of them at chosen parameters.

Read ``variant`` (Method and Variant), ``structure`` (what a method's gradient is a function of), ``params`` (typed parameters and
specs), ``registry`` (register, get, resolve); ``cards`` and ``citations`` print them.
"""

from qlens.registry.registry import get, methods, names, register, resolve
from qlens.registry.variant import Method, Variant

__all__ = ["Method", "Variant", "get", "methods", "names", "register", "resolve"]
