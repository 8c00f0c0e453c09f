"""The trained model's forward pass: hidden states and head where possible, else whole logits."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from qlens.engine.fused import why_whole_logits
from qlens.engine.models.backbone import Backbone
from qlens.engine.models.backbones import Backbones
from qlens.engine.models.head_capture import NoBackbone
from qlens.engine.models.packing import uncached
from qlens.engine.verification.batch_layout import why_whole_batches
from qlens.registry import Variant


class StudentPass(NamedTuple):
    """One forward pass of the trained model.

    Attributes:
        values: hidden states (B, T, H) beside a backbone, else logits (B, T, V); differentiable.
        backbone: None for whole logits.
        outputs: everything that the model returned.
    """

    values: Tensor
    backbone: Backbone | None
    outputs: Any


class Student:
    """Chooses between hidden states and whole logits for every forward pass of the trained model.

    Args:
        variant: the method.
        fused: None for hidden states wherever model, method and machine allow, True to insist, False for whole logits.
    """

    def __init__(self, variant: Variant, fused: bool | None):
        self.variant, self.backbones = variant, Backbones(fused)
        self._layout_reason: str | None = None  # why the loss needs the layout of its batch; None until it is tried

    def run(
        self, model: nn.Module, wrapped: nn.Module, features: Mapping[str, Any], whole: bool, machine: str
    ) -> StudentPass:
        """Run the model on a batch.

        Args:
            model: the model itself.
            wrapped: the model in its wrapper, which is called.
            features: its inputs.
            whole: whether logits are wanted beside the loss.
            machine: why the machine needs whole logits, "" where it does not.
        """
        backbone = None if whole else self._backbone(model, features, machine)
        if backbone is not None:
            try:
                hidden, outputs = backbone.run(features, wrapped)
                return StudentPass(hidden, backbone, outputs)
            except NoBackbone as reason:
                self.backbones.give_up(model, "model", reason)
        return self.run_whole(model, wrapped, features)

    def run_whole(self, model: nn.Module, wrapped: nn.Module, features: Mapping[str, Any]) -> StudentPass:
        """Run the model on a batch for whole logits."""
        outputs = wrapped(**features, **uncached(model))
        return StudentPass(outputs["logits"], None, outputs)

    def use_whole_logits(self, reason: str) -> None:
        """Use whole logits from now on.

        Raises:
            NoBackbone: ``fused`` is True.
        """
        self._layout_reason = reason
        self.backbones.refuse(f"for {self.variant.spec}: {reason}")

    def _backbone(self, model: nn.Module, features: Mapping[str, Any], machine: str) -> Backbone | None:
        """The model's backbone where method and machine allow."""
        if reason := why_whole_logits(self.variant) or machine:
            return self.backbones.refuse(reason)
        backbone = self.backbones.of(model, features)
        if backbone is not None and self._layout_reason is None:
            self._layout_reason = why_whole_batches(self.variant, backbone.head.weight.shape[0])
        if self._layout_reason:
            return self.backbones.refuse(f"for {self.variant.spec}: {self._layout_reason}")
        return backbone
