"""Token figures: what a target shows at every token, p_y, the label weight, Q of the label and of the runner-up and so on."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens

Figures = Mapping[str, Float[Tensor, " N"]]


def token_figures(target: Target, tokens: Tokens, losses: Float[Tensor, " N"]) -> Figures:
    """The figures of every token by name, (N,) on the CPU; ``runner_up`` is a token id.

    Args:
        target: the implied target, N rows.
        tokens: the tokens that it belongs to.
        losses: unreduced losses in nats.

    Example:
        >>> import qlens
        >>> t = qlens.probes()
        >>> figures = token_figures(qlens.get("dft").target(t), t, qlens.get("dft").loss(t))
        >>> bool((figures["label_weight"] - figures["p_y"]).abs().max() < 1e-6)
        True
    """
    y, p, g = tokens.labels[:, None].long(), target.probs, target.grad
    runner_up = p.scatter(1, y, -1).argmax(-1, keepdim=True)
    q_label, q_runner_up = (p.gather(1, ids)[:, 0] - g.gather(1, ids)[:, 0] / target.scale for ids in (y, runner_up))
    figures = {
        "p_y": p.gather(1, y)[:, 0],
        "runner_up": runner_up[:, 0],
        "p_runner_up": p.gather(1, runner_up)[:, 0],
        "loss": losses,
        "label_weight": target.label_weight,
        "reshape": target.reshape,
        "q_label": q_label,
        "q_runner_up": q_runner_up,
        "negative_mass": target.negative_mass,
        "total": target.total,
        "label_grad": g.gather(1, y)[:, 0],
        "runner_up_grad": g.gather(1, runner_up)[:, 0],
        "grad_norm": g.double().norm(dim=-1),
        "rest": target.rest.double(),
    }
    return {name: value.detach().cpu() for name, value in figures.items()}


def joined(parts: Sequence[Figures]) -> Figures:
    """The figures of several blocks of tokens in one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
