"""Comparables: what QTrainer logs beside its loss, so that runs of different methods can be compared."""

import math
from typing import Any

import torch
from torch import Tensor

from qlens.core.supervised import Supervised
from qlens.core.target import Target
from qlens.core.tokens import PER_TOKEN, Tokens
from qlens.engine.verification.declarations import why_whole
from qlens.registry import Variant

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
        if not _apart(variant, tokens):
            return self.add(variant.target(tokens), losses)
        for rows in _blocks(tokens.logits):
            few = tokens[rows]
            self._count(variant.target(few), losses[rows])

    def observe(self, tokens: Tokens, target: Target, losses: Tensor) -> None:
        """``add``, as an observer of the engine."""
        self.add(target, losses)

    def add(self, target: Target, losses: Tensor) -> None:
        """Count tokens whose targets are known."""
        blocks = _blocks(target.logits)
        for rows in blocks:
            self._count(target if len(blocks) == 1 else target[rows], losses[rows])

    def add_total(self, total: Tensor, target: Target) -> None:
        """Count tokens whose targets are known, and of whose losses only the sum is."""
        number = len(target.labels)
        self.add(target, (total.detach() / number).expand(number))

    def add_losses(self, total: Tensor, number: int) -> None:
        """Count a summed loss of so many tokens of whose targets nothing is known."""
        self.sums[COMPARABLES.index("loss")] += torch.tensor([float(total.detach()), number], dtype=torch.float64)

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
        if not total["nll"][1]:  # of no token is more known than the loss
            return {"loss": (total["loss"][0] / total["loss"][1]).item()}
        means = {name: (value[0] / value[1]).item() for name, value in total.items()}
        pull, room, weight, squared = (means.pop(name) for name in ("pull", "room", "weight", "weight_squared"))
        means["trust"] = pull / room if room else math.nan
        return means | ({"ess": weight**2 / squared} if squared else {})


def _apart(variant: Variant, tokens: Tokens) -> bool:
    """Whether rows may be looked at a few at a time, as the engine would: by the card of a built-in method, else as verified."""
    if variant.scope != "token" or (variant.derived and not variant.method.scope):
        return False
    fields = {name: value for name, value in tokens.fields().items() if name in PER_TOKEN}
    block = max(1, ENTRIES // tokens.logits.shape[1])
    return not why_whole(variant, lambda index: tokens[index.to(tokens.logits.device)], len(tokens), block, fields)


def read_target(total: Tensor, logits: Tensor, where: Supervised) -> Target:
    """The targets of a batch's supervised tokens, read from the gradient of their summed loss by the logits, (B, T, V)."""
    (grad,) = torch.autograd.grad(total, logits, retain_graph=True, allow_unused=True)
    grad = torch.zeros_like(logits) if grad is None else grad
    tokens = Tokens.unchecked(logits=where.take(logits.detach()), labels=where.labels.to(logits.device))
    return Target.from_grad(tokens, where.take(grad))


def _blocks(logits: Tensor) -> list[slice]:
    """Rows whose logits are computed on at a time."""
    size = max(1, ENTRIES // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]
