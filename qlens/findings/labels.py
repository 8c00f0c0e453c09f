"""Label ids: whether a loss weighs a token by which id its label is, found by giving one token every id in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlens.findings.noise import TOLERANCE, rounding
from qlens.lens import gradient
from qlens.matching import written
from qlens.tokens import MODELS, Tokens

SHOWN = 6  # ids named in a sentence


@dataclass(frozen=True)
class LabelWeights:
    """A weight by label id.

    Args:
        weights: the gradient's factor for every id tried.
        usual: the weight that counts as 1: that of most ids, else the least.
        equal: whether the ids change nothing but a factor; False where they also change the direction.
    """

    weights: dict[int, float]
    usual: float
    equal: bool = True

    @property
    def unusual(self) -> dict[int, float]:
        """The ids whose weight is not the usual one."""
        return {i: w for i, w in self.weights.items() if abs(w - self.usual) > 1e-4 * abs(self.usual)}

    def of(self, labels: Tensor) -> Tensor:
        """The weight of every label; the usual one for ids that were not tried, (N,)."""
        found = [self.weights.get(int(label), self.usual) for label in labels]
        return torch.tensor(found, dtype=torch.float64, device=labels.device)

    def __str__(self) -> str:
        if not self.equal:
            return "which ids the entries of the vocabulary have changes the gradient"
        said = [f"{w:.5g} for id {i}" for i, w in list(self.unusual.items())[:SHOWN]]
        more = f", ... ({len(self.unusual)} ids)" if len(self.unusual) > SHOWN else ""
        rest = f", {self.usual:.5g} for the others" if len(self.unusual) < len(self.weights) else ""
        return f"a weight by label id: {', '.join(said)}{more}{rest} (ids {min(self.weights)} to {max(self.weights)} tried)"


def label_weights(
    loss: Callable[[Tokens], Tensor], tokens: Tokens, row: int, ids: Sequence[int], precision: torch.dtype
) -> LabelWeights | None:
    """How a gradient changes when the vocabulary is rolled so that one token's label has another id; None if it does not.

    Args:
        loss: an unreduced loss, tokens -> (N,).
        tokens: where to try it; without pairs.
        row: the token that is given every id, in a batch of its copies.
        ids: the ids to try.
        precision: what the loss computes in.
    """
    size, count = tokens.logits.shape[1], len(ids)
    where = torch.as_tensor(ids, device=tokens.logits.device)
    rolled = (torch.arange(size, device=where.device)[None] - (where - tokens.labels[row])[:, None]) % size
    copies = tokens[torch.full((count,), row, device=where.device)]
    fields = {name: getattr(copies, name).gather(1, rolled) for name in (*MODELS, "logits", "negatives")
              if getattr(copies, name) is not None}  # fmt: skip
    if copies.sequence is not None:
        fields["sequence"] = torch.arange(count, device=where.device)
    same = copies.replace(labels=where.to(copies.labels.dtype), **fields)
    grad = gradient(loss, same).double()
    noise = rounding(grad, same, precision).rows
    back = torch.zeros_like(grad).scatter(1, rolled, grad)
    sizes = back.norm(dim=-1)
    telling = sizes > 100 * noise
    if not bool(telling.any()):
        return None
    usual_row = int((sizes - sizes[telling].median()).abs().argmin())
    base = back[usual_row]
    ratio = (back * base).sum(-1) / base.square().sum()
    digits = TOLERANCE + float(noise[usual_row] / sizes[usual_row])
    if float((ratio - 1).abs().max()) <= 10 * digits:
        return None
    off = (back - ratio[:, None] * base).norm(dim=-1)
    equal = bool((off <= 10 * digits * sizes.maximum(sizes[usual_row])).all())
    ratio = [written(float(r), 10 * digits) for r in ratio]
    usual = max(set(ratio), key=ratio.count)
    if ratio.count(usual) * 2 <= count:
        usual = min(abs(r) for r in ratio if r)
    weights = {int(i): written(r / usual, 10 * digits) for i, r in zip(ids, ratio, strict=True)}
    return LabelWeights(weights, 1.0, equal)
