"""qlens: see and design the target distribution behind any supervised fine-tuning loss."""

from typing import Any

__version__ = "0.1.0"

from qlens.checks import CheckReport, check
from qlens.destination import Destination, destination
from qlens.engine import fused_loss
from qlens.errors import InputError, ParameterError, UnknownName
from qlens.explain import explain
from qlens.explanation import Explanation
from qlens.heads import Head, TopK
from qlens.lens import implied_target
from qlens.probes import probes
from qlens.registry import Variant, get, names, register
from qlens.structure import GeometricMixture
from qlens.target import Target
from qlens.tokens import Tokens

__all__ = [
    "CheckReport",
    "Destination",
    "Explanation",
    "GeometricMixture",
    "Head",
    "InputError",
    "ParameterError",
    "QTrainer",
    "Target",
    "Tokens",
    "TopK",
    "UnknownName",
    "Variant",
    "Watch",
    "check",
    "compare",
    "destination",
    "explain",
    "fused_loss",
    "get",
    "implied_target",
    "names",
    "probes",
    "register",
    "view",
]

# these import transformers and matplotlib
_LAZY = {
    "QTrainer": "qlens.training",
    "Watch": "qlens.watch",
    "compare": "qlens.analysis.compare",
    "view": "qlens.analysis.view",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qlens' has no attribute {name!r}")


from qlens import variants as variants  # noqa: E402  last: every method registers itself, so the registry is never empty
