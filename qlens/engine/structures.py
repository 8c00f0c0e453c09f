"""The declared structure of a method, and the function that computes its gradient."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlens.core.numerics import precision
from qlens.core.tokens import MODELS, Tokens
from qlens.engine.dense import dense_gradients
from qlens.engine.kernels.plain import label_gradient_
from qlens.engine.label_only import (
    collected_label_gradients,
    evaluate,
    label_gradients,
    label_log_probs,
)
from qlens.engine.mixtures import mixture_gradients, uniform_gradients
from qlens.engine.row_inputs import RowGradients, RowInputs, shown_inputs
from qlens.registry import Variant
from qlens.registry.structure import GeometricMixture, Structure

GradientFunction = Callable[[RowInputs, slice, Tensor, dict[str, Tensor]], RowGradients]


def gradient_function(structure: Structure) -> GradientFunction:
    """The function that overwrites a chunk's logits with gradients, for a structure."""
    if isinstance(structure, GeometricMixture):
        return uniform_gradients if structure.model is None else mixture_gradients
    return label_gradients if structure == "label" else dense_gradients


def effective_structure(variant: Variant, tokens: Tokens) -> Structure:
    """The structure by which gradient and loss are computed: the declared one, but "dense" for a mixture without a target.

    A mixture's trust and scale are read from the target, and a loss alone has none.

    Args:
        variant: the method.
        tokens: at least one row, with the fields that it needs.
    """
    declared = variant.structure
    if variant.built_in or not isinstance(declared, GeometricMixture):
        return declared
    if variant.is_loss_alone(tokens):
        return "dense"
    target_alone = declared.value is None and variant.method.printed is None
    return replace(declared, value="cross_entropy") if target_alone else declared


def gradients_by_structure(variant: Variant, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The logit gradient, (N, V), and the losses, (N,), of a method by its declared structure, on all rows together."""
    fields = {name: value for name, value in tokens.fields().items() if name not in ("logits", "labels")}
    visible = shown_inputs(variant, fields)
    z = tokens.logits.detach().clone().to(precision(tokens.logits.dtype))
    models: dict[str, Any] = {name: value.detach().to(z.dtype) for name, value in visible.items() if name in MODELS}
    inputs = RowInputs(
        variant=variant,
        structure=effective_structure(variant, tokens),
        labels=tokens.labels.long(),
        models=models,
        fields={name: value for name, value in visible.items() if name not in MODELS},
        tile=len(z),
    )
    rows, gradients = slice(0, len(z)), gradient_function(inputs.structure)
    if inputs.needs_all_rows:
        other_log_probs = {name: label_log_probs(inputs, name, rows, logits) for name, logits in models.items()}
        student = label_gradient_(z.clone(), inputs.labels[:, None])
        gradients = collected_label_gradients(evaluate(inputs, slice(None), student, other_log_probs))
    result = gradients(inputs, rows, z, models)
    if result.uniform is not None:
        z -= result.uniform[:, None] / z.shape[1]
    grad = result.scale[:, None] * z
    if result.not_finite is not None:
        grad[result.not_finite] = torch.nan  # a kernel may put another number for what is none
    return grad, result.losses
