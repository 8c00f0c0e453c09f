"""Structure "dense": any method, by autograd of its loss or by its explicit target, on the whole distributions."""

import torch
from torch import Tensor

from qlens.core.autograd import slope_of
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.engine.kernels.plain import CachedTokens, target_gradient_
from qlens.engine.row_inputs import RowGradients, RowInputs, joined, slices
from qlens.losses.leaves import refuse_learned
from qlens.losses.reduction.unreduced import value_alone


def dense_gradients(inputs: RowInputs, rows: slice, z: Tensor, other_logits: dict[str, Tensor]) -> RowGradients:
    """Overwrite a chunk's logits with the gradient of a method's loss, or with s (p - Q) of its target.

    Args:
        inputs: the batch.
        rows: which of its rows the chunk holds.
        z: their logits, (n, V).
        other_logits: the other models' logits at these rows.
    """
    invalid = (~z.amax(-1).isfinite()).sum()
    tiles = []
    for tile in slices(len(z), inputs.tile):
        at = slice(rows.start + tile.start, rows.start + tile.stop)
        models = {name: logits[tile] for name, logits in other_logits.items()}
        tokens = CachedTokens.unchecked(logits=z[tile], labels=inputs.labels[at], **models, **inputs.fields_at(at))
        by_loss = inputs.variant.is_loss_alone(tokens)
        tiles.append(_by_autograd(inputs, z[tile], tokens) if by_loss else _by_target(inputs, z[tile], tokens))
    return joined(tiles)._replace(invalid=invalid)


def _by_autograd(inputs: RowInputs, z: Tensor, tokens: Tokens) -> RowGradients:
    """g in place of the logits, from a loss that has no target beside it."""
    variant, ones, none = inputs.variant, torch.ones_like(z[:, 0]), torch.zeros_like(tokens.labels[:1]).sum()
    selects = variant.denominator == "selected"
    if not inputs.gradients and not selects:
        with torch.no_grad():
            return RowGradients(ones, variant.loss(tokens), none, none, None)
    with torch.enable_grad(), value_alone():
        leaf = z.detach().requires_grad_()
        losses = variant.loss(tokens.with_logits(leaf))
        refuse_learned(variant.spec, losses, leaf)
        grad = slope_of(losses, leaf)
    selected = inputs.selected(Target.from_grad(tokens, grad)) if selects else none
    z.copy_(grad)
    return RowGradients(ones, losses.detach(), selected, none, None)


def _by_target(inputs: RowInputs, z: Tensor, tokens: CachedTokens) -> RowGradients:
    """g' in place of the logits, from the explicit target."""
    replay = inputs.variant.replay(z.device)
    with torch.no_grad():
        losses = inputs.losses(tokens)
        with replay.again():  # a method that draws numbers has one target and loss
            target = inputs.variant.target(tokens)
        selected = inputs.selected(target)
        not_finite = inputs.not_finite(target.scale, target.constructed, target.pushed)
        scale = target_gradient_(z, tokens, target)
    return RowGradients(scale, losses, selected, torch.zeros_like(selected), not_finite)
