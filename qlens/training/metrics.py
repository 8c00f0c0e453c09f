"""The metrics that QTrainer logs with its loss, the same for every method."""

import math
from typing import Any

import torch
from torch import Tensor

from qlens.core.supervised import Supervised
from qlens.core.target import Target
from qlens.core.tokens import PER_TOKEN, Tokens
from qlens.engine.verification.declarations import why_whole
from qlens.registry import Variant

SUMS = (
    "loss",
    "nll",
    "negative_mass",
    "label_gradient",
    "rest",
    "signed_share",
    "entropy",
    "mean_token_accuracy",
    "target_entropy",
    "kl_target",
    "trust",
    "trust_squared",
)
PARTIAL = SUMS.index("target_entropy")  # from here on, tokens without a value (NaN) are not counted
ENTRIES = 2**20  # logits whose metrics are computed at a time


class MetricSums:
    """Running float64 sums of the metrics over the tokens of several micro-batches, and the number of tokens in each."""

    def __init__(self):
        self.sums = torch.zeros(len(SUMS), 2, dtype=torch.float64)

    def add_tokens(self, variant: Variant, tokens: Tokens, losses: Tensor) -> None:
        """Count tokens whose targets are still to be computed; a tile at a time where rows do not depend on each other."""
        tokens = tokens.with_logits(tokens.logits.detach())
        if not _rows_are_independent(variant, tokens):
            return self.add(variant.target(tokens), losses)
        for rows in _tiles(tokens.logits):
            tile = tokens[rows]
            self._count(variant.target(tile), losses[rows])

    def observe(self, tokens: Tokens, target: Target, losses: Tensor) -> None:
        """``add``, as an observer of ``fused_loss``."""
        self.add(target, losses)

    def add(self, target: Target, losses: Tensor) -> None:
        """Count tokens whose targets are known."""
        tiles = _tiles(target.logits)
        for rows in tiles:
            self._count(target if len(tiles) == 1 else target[rows], losses[rows])

    def add_total(self, total: Tensor, target: Target) -> None:
        """Count tokens whose targets are known, and only the sum of whose losses is."""
        number = len(target.labels)
        self.add(target, (total.detach() / number).expand(number))

    def add_losses(self, total: Tensor, number: int) -> None:
        """Count a summed loss of ``number`` tokens whose targets are not known."""
        self.sums[SUMS.index("loss")] += torch.tensor([float(total.detach()), number], dtype=torch.float64)

    def _count(self, target: Target, losses: Tensor) -> None:
        target = target.at("unit")
        signed = (~target.in_simplex).to(target.room)
        values = [losses.detach(), -target.label_log_probs, target.negative_mass, target.pull, target.room, signed]
        values += [target.student_entropy, target.correct]
        values += [target.entropy, target.kl, target.trust]
        table = torch.stack([value.to(target.room.dtype) for value in values]).cpu().double()
        table = torch.cat([table, table[-1:].square()])
        counted = torch.ones_like(table, dtype=torch.bool)
        counted[PARTIAL:] = ~table[PARTIAL:].isnan()
        self.sums += torch.stack([torch.where(counted, table, 0.0).sum(1), counted.sum(1)], 1)

    def means(self, accelerator: Any) -> dict[str, float]:
        """Means over all tokens so far, on all processes, in nats and at unit scale; empty if there were none.

        ``loss``: the variant's own. ``nll``: -log p_y. ``negative_mass``: sum_k max(0, -Q_k). ``label_weight`` (also under
        its old key ``trust``): the label gradients as a share of SFT's, sum(-g_y) / sum(1 - p_y). ``ess``: the effective
        sample size of the tokens' trusts t, (sum t)^2 / sum t^2 as a share of their number; 1 when all count alike, absent
        when all are 0. ``entropy``: H(p). ``mean_token_accuracy``: the share of tokens whose label is the most probable.
        ``signed_share``: the share of tokens whose Q has negative entries. ``target_entropy``: H(Q) and ``kl_target``:
        KL(Q || p), over all the other tokens; NaN if there are none.
        """
        sums = self.sums
        if accelerator.num_processes > 1:
            sums = accelerator.gather(sums.to(accelerator.device)[None]).sum(0).cpu()
        total = dict(zip(SUMS, sums.unbind(), strict=True))
        if not total["loss"][1]:
            return {}
        if not total["nll"][1]:  # only the losses are known
            return {"loss": (total["loss"][0] / total["loss"][1]).item()}
        means = {name: (value[0] / value[1]).item() for name, value in total.items()}
        label_gradient, rest = means.pop("label_gradient"), means.pop("rest")
        trust, squared = means.pop("trust"), means.pop("trust_squared")
        means["trust"] = means["label_weight"] = label_gradient / rest if rest else math.nan
        return means | ({"ess": trust**2 / squared} if squared else {})


def _rows_are_independent(variant: Variant, tokens: Tokens) -> bool:
    """Whether targets may be computed a tile at a time: by the card of a built-in method, else as verified."""
    if variant.scope != "token" or (variant.derived and not variant.method.scope):
        return False
    fields = {name: value for name, value in tokens.fields().items() if name in PER_TOKEN}
    block = max(1, ENTRIES // tokens.logits.shape[1])
    return not why_whole(variant, lambda index: tokens[index.to(tokens.logits.device)], len(tokens), block, fields)


def read_target(total: Tensor, logits: Tensor, batch: Supervised) -> Target:
    """The targets of a batch's supervised tokens, read from the gradient of their summed loss by the logits, (B, T, V)."""
    (grad,) = torch.autograd.grad(total, logits, retain_graph=True, allow_unused=True)
    grad = torch.zeros_like(logits) if grad is None else grad
    tokens = Tokens.unchecked(logits=batch.take(logits.detach()), labels=batch.labels.to(logits.device))
    return Target.from_grad(tokens, batch.take(grad))


def _tiles(logits: Tensor) -> list[slice]:
    """Rows whose metrics are computed at a time."""
    size = max(1, ENTRIES // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]
