"""Comparables: what QTrainer logs beside its loss, so that runs of different methods can be compared."""

import math
from typing import Any

import torch
from torch import Tensor

from qlens.registry import Variant
from qlens.target import Target
from qlens.tokens import Tokens

COMPARABLES = (
    "loss",
    "nll",
    "negative_mass",
    "pull",
    "room",
    "weight",
    "weight_squared",
    "target_entropy",
    "kl_target",
)


class Tally:
    """Running sums of the comparables over the tokens of several micro-batches."""

    def __init__(self):
        self.sums = torch.zeros(len(COMPARABLES), 2, dtype=torch.float64)

    def look(self, variant: Variant, tokens: Tokens, losses: Tensor) -> None:
        """Count these tokens in."""
        tokens = tokens.replace(logits=tokens.logits.detach())
        self.add(tokens, variant.target(tokens), losses)

    def add(self, tokens: Tokens, target: Target, losses: Tensor) -> None:
        """Count tokens in whose targets are known."""
        target = target.at("unit")
        weight, entropy, kl = (v[v.isfinite()] for v in (target.trust, target.entropy, target.kl))
        values = (losses, -tokens.label_log_probs, target.negative_mass, target.pull, target.room)
        values += (weight, weight.square(), entropy, kl)
        self.sums += torch.tensor([[value.sum().item(), len(value)] for value in values], dtype=torch.float64)

    def means(self, accelerator: Any) -> dict[str, float]:
        """Means over all tokens so far, on all processes; empty if there were none. Nats, Q in unit scale.

        ``loss``: the variant's own. ``nll``: -log p_y. ``negative_mass``: sum_k max(0, -Q_k). ``trust``: the pull on the
        labels as a share of SFT's, sum(-g_y) / sum(1 - p_y). ``ess``: the effective sample size of the tokens' trusts t,
        (sum t)^2 / sum t^2 as a share of their number; 1 when all count alike, absent when none is trusted.
        ``target_entropy``: H(Q) and ``kl_target``: KL(Q || p), over the tokens whose Q is a distribution; NaN if none is.
        """
        sums = self.sums
        if accelerator.num_processes > 1:
            sums = accelerator.gather(sums.to(accelerator.device)[None]).sum(0).cpu()
        total = dict(zip(COMPARABLES, sums.unbind(), strict=True))
        if not total["loss"][1]:
            return {}
        means = {name: (value[0] / value[1]).item() for name, value in total.items()}
        pull, room, weight, squared = (means.pop(name) for name in ("pull", "room", "weight", "weight_squared"))
        means["trust"] = pull / room if room else math.nan
        return means | ({"ess": weight**2 / squared} if squared else {})
