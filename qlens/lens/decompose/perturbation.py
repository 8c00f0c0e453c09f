"""Perturbation: tokens changed one at a time, and the gradients that change with them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.numerics import spread
from qlens.core.tokens import MODELS, Tokens
from qlens.losses.layout.layouts import Layout, tiled

PERTURBED = 12  # tokens changed, one at a time
SIZES = (7, 28)  # the first so many tokens, read as a batch of their own
COPIES = (4, 40)  # of all tokens, in one batch
MOST = 2**20  # entries of the logits in such a batch
FIELDS = ("logits", "labels", "weight", "advantage", "critical", "hint", "reference", "teacher", "old", "second")


class Perturbation:
    """Tokens to be changed one at a time.

    Args:
        tokens: the batch.
        needs: fields that the loss asks for.
        ids: class weights: some labels are changed to an id of another weight, the others to the next id.
        by_text: fields that have one value per text, which are not changed.
    """

    def __init__(self, tokens: Tokens, needs: Sequence[str], ids: Mapping[int, float], by_text: Sequence[str]):
        self.tokens, self.ids = tokens, ids
        self.rows = spread(len(tokens), PERTURBED).to(tokens.logits.device)
        left_out = (*by_text, *(() if "weight" in needs else ("weight",)))
        self.fields = tuple(name for name in FIELDS if name in tokens.fields() and name not in left_out)
        draw, size = torch.Generator().manual_seed(0), (len(self.rows), tokens.logits.shape[1])
        self.noise = 2 * torch.randn(size, generator=draw, dtype=torch.float64)

    def other_id(self, label: int, place: int) -> int:
        """The id that a label is changed to."""
        other_weight = (i for i, weight in self.ids.items() if weight != self.ids.get(label))
        following = (label + 1) % self.tokens.logits.shape[1]
        return following if place % 3 == 0 else next(other_weight, following)

    def at(self, place: int, fields: Sequence[str]) -> Tokens:
        """The tokens with one of them changed in some fields."""
        row, changed = int(self.rows[place]), {}
        for name in fields:
            value = getattr(self.tokens, name).detach().clone()
            if name in ("logits", *MODELS):
                offset = self.noise[place] if name == "logits" else self.noise[place].roll(len(name))
                value[row] += offset.to(value)
            elif name == "labels":
                value[row] = self.other_id(int(value[row]), place)
            elif value.dtype == torch.bool:
                value[row] = ~value[row]
            else:
                value[row] = 1.7 * value[row] + 0.3
            changed[name] = value
        return self.tokens.replace(**changed)


def affected_tokens(
    rows: Callable,
    changes: Perturbation,
    fields: Sequence[str],
    before: Tensor,
    tolerance: float,
    noise: Tensor,
    most: int = PERTURBED,
) -> Tensor:
    """Whether changing a token changes the gradient of every other one, (changed, N)."""
    affected, size = [], before.double().norm(dim=-1)
    places = range(len(changes.rows)) if most >= len(changes.rows) else spread(len(changes.rows), most).tolist()
    for place in places:
        after = gradient(rows, changes.at(place, fields))
        changed = (after - before).double().norm(dim=-1) > tolerance * (size + size.max() * 1e-6) + 2 * noise
        changed[changes.rows[place]] = False
        affected.append(changed)
    return torch.stack(affected)


def change_with_number(
    rows: Callable, tokens: Tokens, before: Tensor, tolerance: float, noise: Tensor
) -> tuple[str, bool]:
    """How a token's gradient changes with the number of tokens, in words, and whether copies of all tokens change it too.

    "" where it does not change. Every copy has sequences of its own.
    """
    size, words, copies = before.double().norm(dim=-1), [], False
    loud = size > 100 * noise
    least = 16 if tokens.pair is not None else 1  # so that no pair is halved
    batches = [tokens[:n] for n in SIZES if least <= n < len(tokens)]
    batches += [tiled(tokens, Layout(n)) for n in COPIES if n * tokens.logits.numel() <= MOST]
    for batch in batches:
        number = min(len(batch), len(tokens))
        after = gradient(rows, batch)[:number]
        off, loud_rows = (after - before[:number]).double().norm(dim=-1), loud[:number]
        if bool((off > tolerance * size[:number] + 4 * noise[:number])[loud_rows].any()):
            ratio = ((after * before[:number]).double().sum(-1) / size[:number].square())[loud_rows]
            low, high = float(ratio.min()), float(ratio.max())
            copies |= len(batch) > len(tokens)
            span = f" to {high:.4g}" if high - low > 1e-3 * abs(high) else ""
            words.append(f"{low:.4g}{span} times with {len(batch)}")
    return f"{', '.join(words)}, against {len(tokens)}" if words else "", copies
