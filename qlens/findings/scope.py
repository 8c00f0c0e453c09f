"""Scope: which other tokens a token's gradient depends on, and whether a weight is held constant, found by perturbing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlens.findings.noise import moves, rounding
from qlens.layouts import Layout, tiled
from qlens.lens import carried, gradient, slopes
from qlens.tokens import MODELS, Tokens, spread

PERTURBED = 12  # tokens changed, one at a time
# of the numerical derivative, in logits, and the share of a slope by which it must be off, in the loss's precision
STEPS = {torch.float64: (1e-5, 1e-4), torch.float32: (0.02, 0.02)}
SIZES = (7, 28)  # the first so many tokens, read as a batch of their own
COPIES = (4, 40)  # of all tokens, in one batch
MOST = 2**20  # entries of the logits in such a batch
READ = ("logits", "labels", "weight", "advantage", "critical", "hint", "reference", "teacher", "old", "second")


@dataclass(frozen=True)
class Scope:
    """What a token's gradient depends on.

    Args:
        of: "token", "sequence", "pair" or "batch".
        evidence: in words, with numbers.
        detached: whether some factor is held constant: the gradient is not the derivative of the printed value; None
            where that cannot be told.
        gap: how far gradient and derivative are apart, as a share of the larger.
        through: what of other tokens it depends on: "logits", "labels", "weight", ...; "number" is how many there are.
    """

    of: str
    evidence: str
    detached: bool | None = None
    gap: float = 0.0
    through: tuple[str, ...] = ()

    def __str__(self) -> str:
        held = {
            True: "part of the loss is held constant (a detached weight): its gradient is not the slope of its value",
            False: "nothing is held constant: the gradient is the slope of the printed value",
            None: "whether something is held constant could not be told",
        }[self.detached]
        return f"{self.evidence}; {held}."


def scope(
    rows: Callable[[Tokens], Tensor],
    tokens: Tokens,
    tolerance: float = 1e-6,
    needs: Sequence[str] = (),
    precision: torch.dtype | None = None,
) -> Scope:
    """Change one token at a time, and the number of tokens, and see whose gradients move; move all logits a little and see
    whether the value follows.

    A token is changed in everything that a loss may read of it: its logits and other models', its label, advantage and masks,
    its weight where the loss asks for weights. What moved the others is then looked for one by one.

    Args:
        rows: an unreduced loss, tokens -> (N,).
        tokens: where to try it; without sequence or pair ids, what reaches further than a token is called "batch".
        tolerance: the relative change of a gradient that counts as rounding.
        needs: the fields that the loss asks for.
        precision: what the loss computes in; by default what the digits of the gradient show.

    Example:
        >>> import qlens
        >>> scope(qlens.get("mile").loss, qlens.probes()).of
        'batch'
    """
    before = gradient(rows, tokens)
    moved = [gradient(rows, other) for other in moves(tokens, precision or carried(before), 1)]
    noise = rounding(before, tokens, precision, moved).rows
    draw = _Changed(tokens, needs)
    reached = _reached(rows, draw, draw.fields, before, tolerance, noise)
    detached, gap = _held(rows, tokens, before, tolerance, precision)
    if not bool(reached.any()):
        number, everywhere = _by_number(rows, tokens, before, tolerance, noise)
        if number:
            of = "sequence" if tokens.sequence is not None and not everywhere else "batch"
            where = "its sequence has" if of == "sequence" else "there are"
            said = f"a token's gradient depends on how many tokens {where}: {number}"
            return Scope(of, said, detached, gap, ("number",))
        said = f"a token's gradient depends on no other token ({len(reached)} changed, one at a time)"
        return Scope("token", said, detached, gap)
    through = tuple(f for f in draw.fields if bool(_reached(rows, draw, (f,), before, tolerance, noise, most=4).any()))
    by = f" through {' and '.join(through)}" if through and through != ("logits",) else ""
    for name in ("sequence", "pair"):
        ids = getattr(tokens, name)
        if ids is not None:
            outside = ids[draw.rows][:, None] != ids
            if not bool((reached & outside).any()):
                said = f"a token's gradient depends on its {name}{by}, and on nothing beyond"
                return Scope(name, said, detached, gap, through)
    share = float(reached.double().mean())
    said = f"{share:.0%}" if share >= 0.005 else f"{float(reached.double().sum(-1).mean()):.2g}"
    return Scope(
        "batch",
        f"a token's gradient depends on the batch: one token moves {said} of the others{by}",
        detached,
        gap,
        through,
    )


class _Changed:
    """Tokens to be changed one at a time, and what is to be changed of them."""

    def __init__(self, tokens: Tokens, needs: Sequence[str]):
        self.tokens = tokens
        self.rows = spread(len(tokens), PERTURBED).to(tokens.logits.device)
        left_out = () if "weight" in needs else ("weight",)
        self.fields = tuple(name for name in READ if name in tokens.fields() and name not in left_out)
        self.draw = torch.Generator().manual_seed(0)
        size = (len(self.rows), tokens.logits.shape[1])
        self.noise = 2 * torch.randn(size, generator=self.draw, dtype=torch.float64)

    def at(self, place: int, fields: Sequence[str]) -> Tokens:
        """The tokens with one of them changed."""
        row, changed = int(self.rows[place]), {}
        for name in fields:
            value = getattr(self.tokens, name).detach().clone()
            if name in ("logits", *MODELS):
                by = self.noise[place] if name == "logits" else self.noise[place].roll(len(name))
                value[row] += by.to(value)
            elif name == "labels":
                value[row] = (value[row] + 1) % self.tokens.logits.shape[1]
            elif value.dtype == torch.bool:
                value[row] = ~value[row]
            else:
                value[row] = 1.7 * value[row] + 0.3
            changed[name] = value
        return self.tokens.replace(**changed)


def _reached(
    rows: Callable,
    changed: _Changed,
    fields: Sequence[str],
    before: Tensor,
    tolerance: float,
    noise: Tensor,
    most: int = PERTURBED,
) -> Tensor:
    """Whether changing a token moves the gradient of every other, (changed, N)."""
    found, size = [], before.double().norm(dim=-1)
    places = range(len(changed.rows)) if most >= len(changed.rows) else spread(len(changed.rows), most).tolist()
    for place in places:
        after = gradient(rows, changed.at(place, fields))
        moved = (after - before).double().norm(dim=-1) > tolerance * (size + size.max() * 1e-6) + 2 * noise
        moved[changed.rows[place]] = False
        found.append(moved)
    return torch.stack(found)


def _by_number(rows: Callable, tokens: Tokens, before: Tensor, tolerance: float, noise: Tensor) -> tuple[str, bool]:
    """How a token's gradient changes with the number of tokens, in words, "" where it does not; and whether copies of all
    tokens, each with sequences of its own, change it.
    """
    size, said, everywhere = before.double().norm(dim=-1), [], False
    there = size > 100 * noise
    least = 16 if tokens.pair is not None else 1  # so that no pair is halved
    batches = [tokens[:n] for n in SIZES if least <= n < len(tokens)]
    batches += [tiled(tokens, Layout(n)) for n in COPIES if n * tokens.logits.numel() <= MOST]
    for batch in batches:
        number = min(len(batch), len(tokens))
        after = gradient(rows, batch)[:number]
        off = (after - before[:number]).double().norm(dim=-1)
        kept = there[:number]
        if bool((off > tolerance * size[:number] + 4 * noise[:number])[kept].any()):
            ratio = ((after * before[:number]).double().sum(-1) / size[:number].square())[kept]
            low, high = float(ratio.min()), float(ratio.max())
            everywhere |= len(batch) > len(tokens)
            said.append(
                f"{low:.4g}"
                + (f" to {high:.4g}" if high - low > 1e-3 * abs(high) else "")
                + f" times with {len(batch)}"
            )
    return f"{', '.join(said)}, against {len(tokens)}" if said else "", everywhere


def _held(
    rows: Callable, tokens: Tokens, before: Tensor, tolerance: float, precision: torch.dtype | None
) -> tuple[bool | None, float]:
    """Whether the gradient differs from the numerical derivative of the value, over random directions."""
    if (precision or tokens.logits.dtype) not in STEPS or tokens.logits.dtype not in STEPS:
        return None, 0.0
    step, least = max(STEPS[tokens.logits.dtype], STEPS[precision or tokens.logits.dtype])
    with torch.no_grad():
        found = list(slopes(lambda moved: rows(moved).double().sum(), before, tokens, step, seed=1))
    gaps = [abs(slope - taken) / max(abs(slope), abs(taken), 1e-300) for slope, taken in found]
    gap = sorted(gaps)[1]  # a kink crossed by one direction says nothing
    return gap > max(least, tolerance), gap
