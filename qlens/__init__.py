"""qlens: see and design the target distribution behind any supervised fine-tuning loss."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from qlens.core.deprecation import serve_old_modules
from qlens.core.errors import InputError, ParameterError, UnknownName
from qlens.core.probes import probes
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.engine.fused import fused_loss
from qlens.engine.heads import Head, TopK
from qlens.lens.implied import implied_target
from qlens.registry import Variant, get, names, register
from qlens.registry.structure import GeometricMixture

if TYPE_CHECKING:
    from qlens.analysis.compare import compare
    from qlens.analysis.plots.variant_figures import plot_plane, plot_text, plot_token
    from qlens.analysis.ranking import rank
    from qlens.analysis.study import Study
    from qlens.analysis.token_view.token_view import view
    from qlens.conformance.report import CheckReport, check
    from qlens.data import encode
    from qlens.lens.equivalences import distances
    from qlens.lens.explain import explain
    from qlens.lens.explanation import Explanation
    from qlens.lens.gradient_flow import Destination, destination
    from qlens.testing import check_variant
    from qlens.training import QLossMixin, QTrainer
    from qlens.training.sft_trainer import QSFTTrainer
    from qlens.training.sources import EMA, AdaptersOff, CurrentModel
    from qlens.training.watch import Watch

__all__ = [
    "EMA",
    "AdaptersOff",
    "CheckReport",
    "CurrentModel",
    "Destination",
    "Explanation",
    "GeometricMixture",
    "Head",
    "InputError",
    "ParameterError",
    "QLossMixin",
    "QSFTTrainer",
    "QTrainer",
    "Study",
    "Target",
    "Tokens",
    "TopK",
    "UnknownName",
    "Variant",
    "Watch",
    "check",
    "check_variant",
    "compare",
    "destination",
    "distances",
    "encode",
    "explain",
    "fused_loss",
    "get",
    "implied_target",
    "lab",
    "names",
    "plot_plane",
    "plot_text",
    "plot_token",
    "probes",
    "rank",
    "register",
    "view",
]

# imported on first use: with them pandas, scipy, transformers and matplotlib
_LAZY = {
    "EMA": "qlens.training.sources",
    "AdaptersOff": "qlens.training.sources",
    "CheckReport": "qlens.conformance.report",
    "CurrentModel": "qlens.training.sources",
    "Destination": "qlens.lens.gradient_flow",
    "Explanation": "qlens.lens.explanation",
    "QLossMixin": "qlens.training",
    "QSFTTrainer": "qlens.training.sft_trainer",
    "QTrainer": "qlens.training",
    "Study": "qlens.analysis.study",
    "Watch": "qlens.training.watch",
    "check": "qlens.conformance.report",
    "check_variant": "qlens.testing",
    "compare": "qlens.analysis.compare",
    "destination": "qlens.lens.gradient_flow",
    "distances": "qlens.lens.equivalences",
    "encode": "qlens.data",
    "explain": "qlens.lens.explain",
    "plot_plane": "qlens.analysis.plots.variant_figures",
    "plot_text": "qlens.analysis.plots.variant_figures",
    "plot_token": "qlens.analysis.plots.variant_figures",
    "rank": "qlens.analysis.ranking",
    "view": "qlens.analysis.token_view.token_view",
}
_PACKAGES = ("analysis", "conformance", "data", "lab", "training")

serve_old_modules()


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"qlens.{name}")
    raise AttributeError(f"module 'qlens' has no attribute {name!r}")


from qlens import variants as variants  # noqa: E402  last: every method registers itself, so the registry is never empty
