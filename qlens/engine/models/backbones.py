"""The backbones of the models of a run."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qlens.engine.models.backbone import Backbone
from qlens.engine.models.head_capture import NoBackbone

logger = logging.getLogger(__name__)


class Backbones:
    """The backbones of the models of a run, verified anew when a head or its hooks change.

    Where a model has none, a log line says why.

    Args:
        fused: None for a backbone wherever there is one, True to insist, False for none.
    """

    def __init__(self, fused: bool | None):
        self.fused = fused
        self.verified: dict[nn.Module, tuple[tuple, Backbone | None]] = {}
        self.reported: set[str] = set()

    def of(self, model: nn.Module, features: Mapping[str, Any], name: str = "model") -> Backbone | None:
        """The backbone of a model, or None where its logits have to be whole.

        Raises:
            NoBackbone: there is none, and ``fused`` is True.
        """
        if self.fused is False:
            return None
        state = _fingerprint(model)
        if model not in self.verified or self.verified[model][0] != state:
            try:
                self.verified[model] = state, Backbone(model, features)
            except NoBackbone as reason:
                self.verified[model] = state, self.refuse(f"of the {name}: {reason}")
        return self.verified[model][1]

    def states(self, model: nn.Module, features: Mapping[str, Any], name: str) -> tuple[Backbone, Tensor] | None:
        """The backbone of a model and its head's input on a batch; None where its logits have to be whole.

        Raises:
            NoBackbone: they have to be, and ``fused`` is True.
        """
        backbone = self.of(model, features, name)
        if backbone is None:
            return None
        try:
            return backbone, backbone.hidden(features)
        except NoBackbone as reason:
            return self.give_up(model, name, reason)

    def give_up(self, model: nn.Module, name: str, reason: NoBackbone) -> None:
        """Use whole logits of a model from now on, until its head changes.

        Raises:
            NoBackbone: ``fused`` is True.
        """
        self.verified[model] = _fingerprint(model), self.refuse(f"of the {name}: {reason}")

    def refuse(self, reason: str) -> None:
        """Log once why logits are whole.

        Raises:
            NoBackbone: ``fused`` is True.
        """
        if self.fused:
            raise NoBackbone(f"fused=True, but there are only whole logits {reason}")
        if self.fused is None and reason not in self.reported:
            self.reported.add(reason)
            logger.warning("qlens holds whole logits %s", reason)


def _fingerprint(model: nn.Module) -> tuple:
    """Of everything that a verification depends on and that may change between steps: head, hooks, configuration."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    parts: list[Any] = []
    for module in (model, head):
        if module is not None:
            hooks = (*module._forward_hooks, *module._forward_pre_hooks)
            parts += [id(module), id(type(module)), id(module.__dict__.get("forward")), hooks]
    for value in (getattr(head, "weight", None), getattr(head, "bias", None)):
        parts.append((tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None)
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    settings = vars(config) if config is not None else {}
    return (*parts, *sorted((name, v) for name, v in settings.items() if isinstance(v, int | float | str)))
