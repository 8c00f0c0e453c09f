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
    "signed_share",
    "target_entropy",
    "kl_target",
    "weight",
    "weight_squared",
)
PARTIAL = COMPARABLES.index("target_entropy")  # from here on, tokens without a value (NaN) are not counted
ENTRIES = 2**20  # logits whose figures are computed at a time


class Tally:
    """Running float64 sums of the comparables over the tokens of several micro-batches, and the number of tokens in each."""

    def __init__(self):
        self.sums = torch.zeros(len(COMPARABLES), 2, dtype=torch.float64)

    def look(self, variant: Variant, tokens: Tokens, losses: Tensor) -> None:
        """Count tokens whose targets are still to be computed; some rows at a time where no row needs another."""
        tokens = tokens.with_logits(tokens.logits.detach())
        if variant.scope != "token" or variant.derived:
            return self.add(tokens, variant.target(tokens), losses)
        for rows in _blocks(tokens):
            few = tokens[rows]
            self._count(variant.target(few), losses[rows])

    def add(self, tokens: Tokens, target: Target, losses: Tensor) -> None:
        """Count tokens whose targets are known."""
        blocks = _blocks(tokens)
        for rows in blocks:
            self._count(target if len(blocks) == 1 else target[rows], losses[rows])

    def _count(self, target: Target, losses: Tensor) -> None:
        target = target.at("unit")
        signed = (~target.in_simplex).to(target.room)
        values = [losses.detach(), -target.label_log_probs, target.negative_mass, target.pull, target.room, signed]
        values += [target.entropy, target.kl, target.trust]
        table = torch.stack([value.to(target.room.dtype) for value in values]).cpu().double()
        table = torch.cat([table, table[-1:].square()])
        counted = torch.ones_like(table, dtype=torch.bool)
        counted[PARTIAL:] = ~table[PARTIAL:].isnan()
        self.sums += torch.stack([torch.where(counted, table, 0.0).sum(1), counted.sum(1)], 1)

    def means(self, accelerator: Any) -> dict[str, float]:
        """Means over all tokens so far, on all processes; empty if there were none. Nats, Q in unit scale.

        ``loss``: the variant's own. ``nll``: -log p_y. ``negative_mass``: sum_k max(0, -Q_k). ``trust``: the pull on the
        labels as a share of SFT's, sum(-g_y) / sum(1 - p_y). ``ess``: the effective sample size of the tokens' trusts t,
        (sum t)^2 / sum t^2 as a share of their number; 1 when all count alike, absent when none is trusted.
        ``signed_share``: the share of tokens whose Q is no distribution. ``target_entropy``: H(Q) and ``kl_target``:
        KL(Q || p), over all the other tokens; NaN if there are none.
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


def _blocks(tokens: Tokens) -> list[slice]:
    """Rows whose logits are computed on at a time."""
    size = max(1, ENTRIES // tokens.logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(tokens), size)]
