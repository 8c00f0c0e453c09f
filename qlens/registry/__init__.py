"""Registry: methods by name, and variants of them at chosen parameters.

Read ``method`` (a registered target and loss with its card), ``variant`` (a method at chosen parameters), ``params`` (typed
parameters and specs), ``structure`` (the kinds of logit gradient) and ``registry`` (register, get, resolve).
``declarations`` checks the fields of a card, ``cards`` prints it, and ``citations`` reads ``variants/references.bib``.
"""

from qlens.registry.method import Method
from qlens.registry.registry import get, methods, names, register, resolve
from qlens.registry.variant import Variant

__all__ = ["Method", "Variant", "get", "methods", "names", "register", "resolve"]
