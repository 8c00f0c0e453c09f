"""Detached factors: whether a gradient is the derivative of the printed value, by finite differences."""

from collections.abc import Callable

import torch
from torch import Tensor

from qlens.core.autograd import gradient, slopes
from qlens.core.tokens import Tokens
from qlens.losses.reduction.unreduced import value_alone

# step of the finite difference in logits, and the relative gap that counts, by the loss's precision
STEPS = {torch.float64: (1e-5, 1e-4), torch.float32: (0.02, 0.02)}
OFFSETS = (0.05, 0.3, 1.0)  # by which logits are moved off ties and thresholds


def finite_difference_gap(
    rows: Callable, tokens: Tokens, tolerance: float = 1e-6, precision: torch.dtype | None = None
) -> tuple[bool | None, float]:
    """Whether the gradient differs from the finite difference of the value along random directions, and by how much.

    It is tried on several batches with logits moved a little: at ties and thresholds a value has no derivative.

    Args:
        rows: an unreduced loss, tokens -> (N,).
        tokens: where to try it.
        tolerance: least relative gap that counts.
        precision: what the loss computes in; by default the dtype of the logits.

    Returns:
        Whether a factor is detached, None where half precision hides it; and the smallest relative gap.
    """
    own, stored = precision or tokens.logits.dtype, tokens.logits.dtype
    if own not in STEPS or stored not in STEPS:
        return None, 0.0
    step, least = max(STEPS[stored], STEPS[own])
    gaps = []
    with value_alone():
        for seed, scale in enumerate(OFFSETS):
            draw = torch.Generator().manual_seed(seed)
            offset = scale * torch.randn(tokens.logits.shape, generator=draw, dtype=torch.float64).to(tokens.logits)
            moved_tokens = tokens.replace(logits=tokens.logits + offset)
            grad = gradient(rows, moved_tokens)
            with torch.no_grad():
                pairs = list(slopes(lambda at: rows(at).double().sum(), grad, moved_tokens, step, seed))
            off = sorted(
                abs(difference - slope) / max(abs(difference), abs(slope), 1e-300) for difference, slope in pairs
            )
            gaps.append(off[1])  # one direction may cross a kink
    gap = min(gaps)
    return gap > max(least, tolerance), gap


def is_detached(rows: Callable, tokens: Tokens) -> bool:
    """Whether a loss holds a factor constant."""
    return bool(finite_difference_gap(rows, tokens)[0])


def own_backward(total: Callable[[Tokens], Tensor], tokens: Tokens) -> str:
    """The name of an autograd function in the graph of a loss that neither torch nor qlens defines; "" where there is none."""
    with torch.enable_grad():
        value = total(tokens.with_logits(tokens.logits.detach().clone().requires_grad_()))
    nodes, visited = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        nodes += [following for following, _ in node.next_functions]
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and function.__module__.partition(".")[0] not in ("torch", "qlens"):
            return function.__name__
    return ""
