"""A causal language model as a backbone and a linear head."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qlens.core.errors import InputError
from qlens.core.numerics import precision
from qlens.engine.heads import Head, capped_
from qlens.engine.models.forward import evaluating, model_logits
from qlens.engine.models.head_capture import NoBackbone, captured_input, linear_head
from qlens.engine.models.packing import uncached
from qlens.losses.leaves import leaves

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
TRIAL_TOKENS = 8  # on which a model's logits are compared with its head's


class DamagedModel(InputError):
    """A model whose logits are NaN at every token."""


class Backbone:
    """A causal language model whose logits are those of a linear ``Head`` on its last hidden states.

    Soft-cap and logit scale are read from the configuration under the names in use (``SOFTCAPS``, Cohere's
    ``logit_scale``, Granite's ``logits_scaling``) and verified: the model's own logits on a few tokens must be the head's,
    also where the head's outputs are replaced by numbers up to 2048. In every later pass the head returns such numbers for
    one entry of the vocabulary, and the model's logits there are compared again.

    Args:
        model: the model itself, or with adapters.
        features: a batch of its inputs, (B, T) each; the first tokens of its first row are used.

    Raises:
        NoBackbone: no linear output embedding, a head that is sharded or adapted, or logits that are not the head's.
        DamagedModel: all of its logits are NaN.
    """

    def __init__(self, model: nn.Module, features: Mapping[str, Any]):
        self.model = model
        try:
            self._verify(_first_tokens(features))
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, NoBackbone | DamagedModel):
                raise
            raise NoBackbone(
                f"it cannot be tried on a few tokens: {type(error).__name__}: {str(error)[:200]}"
            ) from error

    @property
    def head(self) -> nn.Linear:
        """The output embedding as it is now."""
        return linear_head(self.model)

    @property
    def _config(self) -> Any:
        config: Any = getattr(self.model, "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def softcap(self) -> float | None:
        """The soft-cap that the configuration names, or None."""
        return next((cap for name in SOFTCAPS if (cap := getattr(self._config, name, None)) is not None), None)

    @property
    def logit_scale(self) -> float:
        """The factor of the head's outputs that the configuration names, or 1."""
        divisor = getattr(self._config, "logits_scaling", None) or 1.0
        return (getattr(self._config, "logit_scale", None) or 1.0) / divisor

    def hidden(self, features: Mapping[str, Any]) -> Float[Tensor, "B T H"]:
        """The head's input on a batch, differentiable."""
        return self.run(features, self.model)[0]

    def run(self, features: Mapping[str, Any], model: nn.Module) -> tuple[Float[Tensor, "B T H"], Any]:
        """The head's input on a batch, and the model's outputs; the logits among them are placeholders.

        Args:
            features: the model's inputs.
            model: the model, or its wrapper.

        Raises:
            NoBackbone: the model's logits are no longer the head's outputs under the configured soft-cap and scale.
        """
        with captured_input(self.head, width=1) as calls:
            outputs = model(**features, **uncached(self.model))
        if len(calls) != 1:
            raise NoBackbone(f"its head ran {len(calls)} times in one pass")
        hidden, probe = calls[0]
        self._compare(outputs["logits"].detach(), probe, _rounding(hidden.dtype))
        return hidden, outputs

    def at(self, hidden: Float[Tensor, "N H"]) -> Head:
        """The head at some hidden states of ``run``, in their dtype and without gradient."""
        weight, bias = self.head.weight.detach(), self.head.bias
        bias = None if bias is None else bias.detach().to(hidden.dtype)
        return Head(hidden.detach(), weight.to(hidden.dtype), bias, self.softcap, self.logit_scale)

    def _verify(self, features: dict[str, Any]) -> None:
        """Compare the model's logits with the head's, on its own hidden states and on probes of the whole vocabulary."""
        with evaluating(self.model):
            logits = model_logits(self.model, features)
            hidden = self.hidden(features)
            expected = self.at(hidden.flatten(0, -2)).logits(slice(None))
        actual, rounding = logits.to(expected.dtype).flatten(0, -2), _rounding(hidden.dtype)
        if actual.shape != expected.shape:
            shapes = f"{tuple(actual.shape)}, its head's {tuple(expected.shape)}"
            raise NoBackbone(f"its logits have shape {shapes}")
        nan_rows = actual.isnan().any(-1)  # at padding, some models attend to nothing
        if len(actual) and bool(nan_rows.all()):
            name = type(self.model).__name__
            raise DamagedModel(f"the logits of {name} are NaN at every token: its weights are damaged, load others")
        compared = ~nan_rows | expected.isfinite().all(-1)
        expected, actual = expected[compared], actual[compared]
        off = float((expected - actual).abs().amax()) if expected.numel() else 0.0
        if not off <= rounding * max(1.0, float(actual.abs().amax())):
            raise NoBackbone(f"its logits are not its head's: they differ by {off:.3g}")
        with evaluating(self.model), captured_input(self.head, logits.shape[-1], record=True) as calls:
            logits = self.model(**features, use_cache=False)["logits"]
        probe = calls[0][1]
        self._compare(logits.detach(), probe, rounding)
        names = {id(value): name for name, value in self.model.named_parameters()}
        if other_leaves := [leaf for leaf in leaves(logits) if leaf is not probe]:
            name_of_leaf = names.get(id(other_leaves[0]), f"a tensor of shape {tuple(other_leaves[0].shape)}")
            raise NoBackbone(f"its logits depend on more than its head's output: on {name_of_leaf}")

    def _compare(self, logits: Tensor, probe: Tensor, rounding: float) -> None:
        """Compare logits with the head's outputs ``probe`` under the configured soft-cap and scale.

        Raises:
            NoBackbone: they differ; by how much is named.
        """
        expected = capped_(probe.detach().to(precision(probe.dtype), copy=True), self.softcap, self.logit_scale)
        if logits.shape != expected.shape:
            raise NoBackbone(
                f"its logits are not its head's: of outputs {tuple(expected.shape)} it makes {tuple(logits.shape)}"
            )
        off = (logits.to(expected.dtype) - expected).abs()
        wrong = ~(off <= rounding * expected.abs())
        if bool(wrong.any()):
            at = int(wrong.flatten().int().argmax())
            output, logit, configured = (float(x.detach().flatten()[at]) for x in (probe, logits, expected))
            raise NoBackbone(
                f"its logits are not its head's: they differ by {abs(logit - configured):.3g} where the head's output "
                f"is {output:g} (the configuration says {configured:.4g}, the model makes {logit:.4g})"
            )


def _rounding(dtype: torch.dtype) -> float:
    """Rounding of logits relative to their size, where the head's product is of this dtype."""
    return 0.03 if dtype.itemsize < 4 else 1e-4


def _first_tokens(features: Mapping[str, Any]) -> dict[str, Any]:
    """The first real tokens of a batch's first row."""
    mask = features.get("attention_mask")
    start = int(mask[0].argmax()) if isinstance(mask, Tensor) and mask.ndim == 2 else 0
    part = (slice(0, 1), slice(start, start + TRIAL_TOKENS))
    return {k: v[part] if isinstance(v, Tensor) and v.ndim > 1 else v for k, v in features.items()}
