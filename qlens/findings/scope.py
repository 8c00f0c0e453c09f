"""Scope: whose logits a token's gradient depends on, and whether a weight is held constant, found by perturbing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlens.lens import gradient, slopes
from qlens.tokens import Tokens, spread

PERTURBED = 12  # tokens changed, one at a time
STEP = 1e-5  # of the numerical derivative, in logits


@dataclass(frozen=True)
class Scope:
    """What a token's gradient depends on.

    Args:
        of: "token", "sequence", "pair" or "batch".
        evidence: in words, with numbers.
        detached: whether some factor is held constant: the gradient is not the derivative of the printed value; None
            where that cannot be told.
        gap: how far gradient and derivative are apart, as a share of the larger.
    """

    of: str
    evidence: str
    detached: bool | None = None
    gap: float = 0.0

    def __str__(self) -> str:
        held = {
            True: "part of the loss is held constant (a detached weight): its gradient is not the slope of its value",
            False: "nothing is held constant: the gradient is the slope of the printed value",
            None: "whether something is held constant could not be told",
        }[self.detached]
        return f"{self.evidence}; {held}."


def scope(rows: Callable[[Tokens], Tensor], tokens: Tokens, tolerance: float = 1e-6) -> Scope:
    """Change one token's logits and see whose gradients move; move all logits a little and see whether the value follows.

    Args:
        rows: an unreduced loss, tokens -> (N,).
        tokens: where to try it; without sequence or pair ids, what reaches further than a token is called "batch".
        tolerance: the relative change of a gradient that counts as rounding.

    Example:
        >>> import qlens
        >>> scope(qlens.get("mile").loss, qlens.probes()).of
        'batch'
    """
    before = gradient(rows, tokens)
    reached = _reached(rows, tokens, before, tolerance)
    detached, gap = _held(rows, tokens, before, tolerance)
    n = int(reached.shape[0])
    elsewhere = reached.any()
    if not bool(elsewhere):
        return Scope(
            "token", f"a token's gradient depends on no other token ({n} changed, one at a time)", detached, gap
        )
    for name in ("sequence", "pair"):
        ids = getattr(tokens, name)
        if ids is not None:
            outside = ids[_changed(tokens)][:, None] != ids
            if not bool((reached & outside).any()):
                return Scope(name, f"a token's gradient depends on its {name}, and on nothing beyond", detached, gap)
    share = float(reached.float().mean())
    return Scope(
        "batch", f"a token's gradient depends on the batch: one token moves {share:.0%} of the others", detached, gap
    )


def _changed(tokens: Tokens) -> Tensor:
    return spread(len(tokens), PERTURBED).to(tokens.logits.device)


def _reached(rows: Callable, tokens: Tokens, before: Tensor, tolerance: float) -> Tensor:
    """Whether changing a token moves the gradient of every other, (changed, N)."""
    found, size = [], before.norm(dim=-1)
    draw = torch.Generator().manual_seed(0)
    for at in _changed(tokens).tolist():
        noise = 2 * torch.randn(tokens.logits.shape[1], generator=draw, dtype=torch.float64)
        logits = tokens.logits.detach().clone()
        logits[at] += noise.to(logits)
        after = gradient(rows, tokens.replace(logits=logits))
        moved = (after - before).norm(dim=-1) > tolerance * (size + size.max() * 1e-6)
        moved[at] = False
        found.append(moved)
    return torch.stack(found)


def _held(rows: Callable, tokens: Tokens, before: Tensor, tolerance: float) -> tuple[bool | None, float]:
    """Whether the gradient differs from the numerical derivative of the value, over random directions."""
    if tokens.logits.dtype != torch.float64:
        return None, 0.0
    with torch.no_grad():
        found = list(slopes(lambda moved: rows(moved).sum(), before, tokens, STEP, seed=1))
    gaps = [abs(slope - taken) / max(abs(slope), abs(taken), 1e-300) for slope, taken in found]
    gap = sorted(gaps)[1]  # a kink crossed by one direction says nothing
    return gap > max(1e-4, tolerance), gap
