"""The router loss of a mixture-of-experts model, a load-balancing term that its trainer adds."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qlens.core.errors import InputError

WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")


def asks_for_router_loss(model: nn.Module) -> bool:
    """Whether a model's configuration asks for its router loss."""
    return any(getattr(source, "output_router_logits", False) is True for source in _configs(model))


def router_loss(model: nn.Module, outputs: Any) -> tuple[Tensor, float] | None:
    """A model's router loss on a batch and its weight in the configuration; None where it has none.

    transformers' models return ``aux_loss`` where ``config.output_router_logits`` is set.

    Raises:
        InputError: there is an auxiliary loss, but no weight.
    """
    loss = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
    if not isinstance(loss, Tensor):
        return None
    for source in (model, *_configs(model)):
        for name in WEIGHTS:
            weight = getattr(source, name, None)
            if isinstance(weight, int | float):
                return loss, float(weight)
    raise InputError(
        f"the model returns an aux_loss, but neither it nor its config has a {' or '.join(WEIGHTS)}: set "
        "model.config.router_aux_loss_coef (0 leaves the loss out)"
    )


def _configs(model: nn.Module) -> tuple[Any, Any]:
    """The configuration of a model, and that of its text model; None where there is none."""
    config: Any = getattr(model, "config", None)
    return config, config.get_text_config() if hasattr(config, "get_text_config") else None
