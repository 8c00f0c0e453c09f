"""Batch changes: how watched tokens' gradients change as the other tokens become likely, unlikely, relabelled or reordered."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.tokens import MODELS, Tokens

LEVELS = (1 - 1e-6, 0.9, 0.5, 0.1, 1e-3, 1e-6, 1e-9)  # label probabilities set for all other tokens
WATCHED = (0.95, 0.8, 0.5, 0.3, 0.1, 0.01)  # label probabilities of the watched tokens
FEWEST = 4  # tokens of a batch


@dataclass
class BatchChanges:
    """How the gradient of watched tokens changed in other batches.

    Args:
        losses: how it changed as the other tokens became likely or unlikely, in words; "" where it did not.
        outside: whether changing only tokens of other sequences or pairs changed it; None where there are none.
        inside: whether changing only tokens of its own sequence or pair changed it.
        labels: whether it changed as other tokens got the same label.
        position: how it changed with the order of the tokens, in words; "" where it did not.
        lowest, highest: mean cross-entropy of the batches tried, in nats.
    """

    losses: str = ""
    outside: bool | None = None
    inside: bool | None = None
    labels: bool = False
    position: str = ""
    lowest: float = 0.0
    highest: float = 0.0
    _means: list[float] = field(default_factory=list)


class ChangedBatches:
    """Batches in which all tokens but the watched ones are changed.

    Args:
        rows: an unreduced loss, tokens -> (N,).
        tokens: the batch.
        before: its gradient, (N, V).
        tolerance: relative change of a gradient that counts as rounding.
        noise: rounding error of every row's gradient, (N,).
        group: sequence or pair ids, (N,); or None.
    """

    def __init__(
        self,
        rows: Callable[[Tokens], Tensor],
        tokens: Tokens,
        before: Float[Tensor, "N V"],
        tolerance: float,
        noise: Float[Tensor, " N"],
        group: Int[Tensor, " N"] | None,
    ):
        self.rows, self.tokens, self.before, self.tolerance, self.noise = rows, tokens, before, tolerance, noise
        p = tokens.label_probs
        own = torch.ones_like(p, dtype=torch.bool) if group is None else group == group.mode().values
        places = [torch.where(own, (p - target).abs(), torch.inf).argmin() for target in WATCHED]
        self.watched = torch.stack(places).unique()
        self.others = torch.ones_like(own)
        self.others[self.watched] = False
        self.outside = None if group is None or bool(own.all()) else ~own

    def changes(self, rearrange: bool = True) -> BatchChanges:
        """How the gradient of the watched tokens changes; ``rearrange`` also relabels and reorders the others."""
        changes = BatchChanges()
        if len(self.tokens) < FEWEST:
            return changes
        changes.losses = self.by_level(self.others, changes)
        if self.outside is not None:
            changes.outside = bool(self.by_level(self.outside, changes))
            changes.inside = bool(self.by_level(self.others & ~self.outside, changes)) if changes.losses else None
        if rearrange:
            changes.labels = any(self.change(batch) for batch in self.relabelled())
            changes.position = self.by_position()
        means = [*changes._means, float(-self.tokens.label_log_probs.mean())]
        changes.lowest, changes.highest = min(means), max(means)
        return changes

    def change(self, batch: Tokens, watched: Int[Tensor, " W"] | None = None) -> str:
        """By how much the gradient of the watched tokens changes in a batch, in words; "" where it does not."""
        watched = self.watched if watched is None else watched
        return self.compared(gradient(self.rows, batch)[watched], watched)

    def compared(self, after: Float[Tensor, "M V"], where: Int[Tensor, " M"]) -> str:
        """By how much given gradients of some tokens differ from those before, in words; "" where they do not."""
        before, noise = self.before[where].double(), self.noise[where]
        size = before.norm(dim=-1)
        off = (after.double() - before).norm(dim=-1)
        changed = off > self.tolerance * (size + self.before.norm(dim=-1).amax() * 1e-6) + 4 * noise
        if not bool(changed.any()):
            return ""
        there = changed & (size > 100 * noise)
        if not bool(there.any()):
            return "no longer zero on some"
        ratio = ((after * before).sum(-1) / size.square())[there]
        low, high = float(ratio.min()), float(ratio.max())
        return f"{low:.4g}" + (f" to {high:.4g}" if high - low > 1e-3 * abs(high) else "") + " times what it was"

    def by_level(self, where: Bool[Tensor, " N"], changes: BatchChanges) -> str:
        """How the gradient of the watched tokens changes as these others are made likely or unlikely, in words."""
        words = ""
        for name, batch, watched in self.levels(where):
            changes._means.append(float(-batch.label_log_probs.mean()))
            if (change := self.change(batch, watched)) and not words:
                words = f"with other tokens {name} it is {change}"
        return words

    def levels(self, where: Bool[Tensor, " N"]) -> Iterator[tuple[str, Tokens, Int[Tensor, " W"]]]:
        """Batches in which some tokens' labels have one probability, or flat logits, by name, and the watched tokens of each.

        At the first and last level only the two likeliest, or unlikeliest, of the watched tokens stay unchanged.
        """
        ranked = self.watched[self.tokens.label_probs[self.watched].argsort(descending=True)]
        z, index = self.tokens.logits.detach(), self.tokens.labels[:, None].long()
        rest = z.scatter(1, index, -torch.inf).logsumexp(-1, keepdim=True)
        watching = [(level, self.watched) for level in LEVELS]
        if bool(where[self.others].all()):
            watching += [(LEVELS[0], ranked[:2]), (LEVELS[-1], ranked[-2:])]
        for level, watched in watching:
            level_logits = z.scatter(1, index, rest + torch.logit(torch.tensor(level, dtype=torch.float64)).to(z))
            there = where.clone()
            if len(watched) < len(ranked):
                there[:] = True
                there[watched] = False
            yield (
                f"at p_y = {level:.6g}",
                self.tokens.replace(logits=torch.where(there[:, None], level_logits, z)),
                watched,
            )
        flat = torch.where(z.isfinite() & where[:, None], 0.0, z)
        yield "flat", self.tokens.replace(logits=flat), self.watched

    def relabelled(self) -> Iterator[Tokens]:
        """Batches in which the tokens before a watched one have its label, by order of the rows and within every text.

        The logits of the old and the new label are swapped, so that p_y stays.
        """
        for ids in (None, self.tokens.sequence):
            labels = self.tokens.labels.clone()
            for row in self.watched.flip(0).tolist():
                before = torch.arange(len(labels), device=labels.device) < row
                before &= self.others if ids is None else self.others & (ids == ids[row])
                labels[before] = self.tokens.labels[row]
            old, new = self.tokens.labels[:, None].long(), labels[:, None].long()
            swapped = {}
            for name in ("logits", *MODELS):
                if (value := getattr(self.tokens, name)) is not None:
                    at_old, at_new = value.gather(1, old), value.gather(1, new)
                    swapped[name] = value.detach().scatter(1, old, at_new).scatter(1, new, at_old)
            yield self.tokens.replace(labels=labels, **swapped)

    def by_position(self) -> str:
        """How gradients change when the tokens are reversed or rotated by one, in words; "" where they do not."""
        number = len(self.tokens)
        places = torch.arange(number, device=self.tokens.labels.device)
        for order in (places.flip(0), places.roll(1)):
            after = torch.empty_like(self.before)
            after[order] = gradient(self.rows, self.tokens[order]).to(after)
            if change := self.compared(after, places):
                return f"in another order it is {change}"
        return ""
