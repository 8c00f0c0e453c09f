"""Scope: which other tokens a token's gradient depends on, and whether a weight is held constant, found by perturbing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlens.core.autograd import gradient, slopes
from qlens.core.numerics import spread
from qlens.core.scales import carried
from qlens.core.tokens import MODELS, Tokens
from qlens.lens.decompose.batch_changes import Batches, Seen
from qlens.lens.rounding import moves, rounding
from qlens.losses.layout.layouts import Layout, tiled
from qlens.losses.reduction.unreduced import value_alone

PERTURBED = 12  # tokens changed, one at a time
# of the numerical derivative, in logits, and the share of a slope by which it must be off, in the loss's precision
STEPS = {torch.float64: (1e-5, 1e-4), torch.float32: (0.02, 0.02)}
UNTIED = (
    0.05,
    0.3,
    1.0,
)  # by how much logits are moved off ties and thresholds in the batches on which slopes are taken
SIZES = (7, 28)  # the first so many tokens, read as a batch of their own
COPIES = (4, 40)  # of all tokens, in one batch
MOST = 2**20  # entries of the logits in such a batch
NOT_MOVED = (" (label ids, other orders and other numbers of tokens are not tried: the inputs of the other model that it runs "
             "are made up and stay in place)")  # fmt: skip
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
        through: what of other tokens it depends on: "logits", "labels", "weight", ...; "losses" is how likely all of them
            are, "number" how many there are; "position" is its own.
        backward: the autograd function of the loss's own that its gradient comes from, "" where there is none.
        effect: how a gradient changes as all other tokens become likely or unlikely, in words, where no single one moves it.
    """

    of: str
    evidence: str
    detached: bool | None = None
    gap: float = 0.0
    through: tuple[str, ...] = ()
    backward: str = ""
    effect: str = ""

    def __str__(self) -> str:
        held = {
            True: f"its backward ({self.backward}, an autograd function of its own) is not the slope of its value"
            if self.backward
            else "part of the loss is held constant (a detached weight): its gradient is not the slope of its value",
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
    ids: Mapping[int, float] | None = None,
    total: Callable[[Tokens], Tensor] | None = None,
    by_text: Sequence[str] = (),
    in_place: bool = False,
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
        ids: weights of label ids: some labels are changed to an id of another weight, the others to the next id.
        total: the sum of the unreduced loss, with the graph of the loss itself, in which a backward of its own is looked for.
        by_text: fields of which a whole text has one value: these are no other token's.
        in_place: whether another model's made-up inputs stay in place as tokens move: then nothing that moves them is tried.

    Example:
        >>> import qlens
        >>> scope(qlens.get("mile").loss, qlens.probes()).of
        'batch'
    """
    before = gradient(rows, tokens)
    moved = [gradient(rows, other) for other in moves(tokens, precision or carried(before), 1)]
    noise = rounding(before, tokens, precision, moved).rows
    draw = _Changed(tokens, needs, ids or {}, by_text)
    reached = _reached(rows, draw, draw.fields, before, tolerance, noise)
    detached, gap = held_constant(rows, tokens, tolerance, precision)
    backward = _own_backward(total or rows, tokens) if detached else ""
    if not bool(reached.any()):
        number, everywhere = ("", False) if in_place else _by_number(rows, tokens, before, tolerance, noise)
        group = tokens.pair if tokens.pair is not None else tokens.sequence
        seen = Batches(rows, tokens, before, tolerance, noise, group).seen(not in_place)
        of, said, through = _of_batches(seen, tokens, number, everywhere, len(reached))
        if in_place:
            said = said.replace("; repeated labels; other orders", "") + NOT_MOVED
        return Scope(of, said, detached, gap, through, backward, seen.losses)
    through = tuple(f for f in draw.fields if bool(_reached(rows, draw, (f,), before, tolerance, noise, most=4).any()))
    by = f" through {' and '.join(through)}" if through and through != ("logits",) else ""
    for name in ("sequence", "pair"):
        groups = getattr(tokens, name)
        if groups is not None:
            outside = groups[draw.rows][:, None] != groups
            if not bool((reached & outside).any()) and not _from_outside(
                rows, tokens, before, tolerance, noise, groups
            ):
                said = f"a token's gradient depends on its {name}{by}, and on nothing beyond"
                return Scope(name, said, detached, gap, through, backward)
    share = float(reached.double().mean())
    said = f"{share:.0%}" if share >= 0.005 else f"{float(reached.double().sum(-1).mean()):.2g}"
    return Scope(
        "batch",
        f"a token's gradient depends on the batch: one token moves {said} of the others{by}",
        detached,
        gap,
        through,
        backward,
    )


def _of_batches(
    seen: Seen, tokens: Tokens, number: str, everywhere: bool, changed: int
) -> tuple[str, str, tuple[str, ...]]:
    """How far a token's gradient reaches that no single other token moves: of what, the evidence, and through what."""
    said, through, of = [], [], "token"
    if seen.losses:
        grouped = seen.inside and not seen.outside
        of = "batch" if not grouped else "pair" if tokens.pair is not None else "sequence"
        said.append(f"on how likely the other labels of its {of} are: {seen.losses}")
        through.append("losses")
    if seen.labels:
        of = "batch"
        said.append("on whether other tokens have its label")
        through.append("labels")
    if number:
        of = "sequence" if tokens.sequence is not None and not everywhere and of != "batch" else "batch"
        where = "its sequence has" if of == "sequence" else "there are"
        said.append(f"on how many tokens {where}: {number}")
        through.append("number")
    if seen.position and not seen.labels:
        said.append(f"on its position: {seen.position}")
        through.append("position")
    evidence = f"a token's gradient depends {', and '.join(said)}"
    if of == "token":
        nothing = " and on no other token" if said else "a token's gradient depends on no other token"
        evidence = evidence if said else ""
        evidence += (
            f"{nothing} as far as tried ({changed} changed, one at a time; batches of mean loss {seen.lowest:.2g} to "
            f"{seen.highest:.2g}; repeated labels{'' if said else '; other orders'})"
        )
    return of, evidence, tuple(through)


def _from_outside(
    rows: Callable[[Tokens], Tensor], tokens: Tokens, before: Tensor, tolerance: float, noise: Tensor, ids: Tensor
) -> bool:
    """Whether tokens of other sequences or pairs move a gradient once all of them are likely or unlikely."""
    return bool(Batches(rows, tokens, before, tolerance, noise, ids).seen().outside)


class _Changed:
    """Tokens to be changed one at a time, and what is to be changed of them."""

    def __init__(self, tokens: Tokens, needs: Sequence[str], ids: Mapping[int, float], by_text: Sequence[str]):
        self.tokens, self.ids = tokens, ids
        self.rows = spread(len(tokens), PERTURBED).to(tokens.logits.device)
        left_out = (*by_text, *(() if "weight" in needs else ("weight",)))
        self.fields = tuple(name for name in READ if name in tokens.fields() and name not in left_out)
        self.draw = torch.Generator().manual_seed(0)
        size = (len(self.rows), tokens.logits.shape[1])
        self.noise = 2 * torch.randn(size, generator=self.draw, dtype=torch.float64)

    def other_id(self, label: int, place: int) -> int:
        """An id to change a label to."""
        apart = (i for i, weight in self.ids.items() if weight != self.ids.get(label))
        following = (label + 1) % self.tokens.logits.shape[1]
        return following if place % 3 == 0 else next(apart, following)

    def at(self, place: int, fields: Sequence[str]) -> Tokens:
        """The tokens with one of them changed."""
        row, changed = int(self.rows[place]), {}
        for name in fields:
            value = getattr(self.tokens, name).detach().clone()
            if name in ("logits", *MODELS):
                by = self.noise[place] if name == "logits" else self.noise[place].roll(len(name))
                value[row] += by.to(value)
            elif name == "labels":
                value[row] = self.other_id(int(value[row]), place)
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


def held_constant(
    rows: Callable, tokens: Tokens, tolerance: float = 1e-6, precision: torch.dtype | None = None
) -> tuple[bool | None, float]:
    """Whether the gradient differs from the numerical derivative of the value, along random directions.

    It is tried on several batches with logits moved a little: at ties and on thresholds a value has no one slope.
    """
    own, stored = precision or tokens.logits.dtype, tokens.logits.dtype
    if own not in STEPS or stored not in STEPS:
        return None, 0.0
    step, least = max(STEPS[stored], STEPS[own])
    gaps = []
    with value_alone():
        for seed, apart in enumerate(UNTIED):
            draw = torch.Generator().manual_seed(seed)
            by = apart * torch.randn(tokens.logits.shape, generator=draw, dtype=torch.float64).to(tokens.logits)
            untied = tokens.replace(logits=tokens.logits + by)
            grad = gradient(rows, untied)
            with torch.no_grad():
                found = list(slopes(lambda moved: rows(moved).double().sum(), grad, untied, step, seed))
            off = sorted(abs(slope - taken) / max(abs(slope), abs(taken), 1e-300) for slope, taken in found)
            gaps.append(off[1])  # a kink crossed by one direction says nothing
    gap = min(gaps)
    return gap > max(least, tolerance), gap


def _own_backward(total: Callable[[Tokens], Tensor], tokens: Tokens) -> str:
    """The name of an autograd function in the graph of a loss that torch and qlens did not bring; "" where there is none."""
    with torch.enable_grad():
        value = total(tokens.with_logits(tokens.logits.detach().clone().requires_grad_()))
    left, seen = [value.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [other for other, _ in node.next_functions]
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and function.__module__.partition(".")[0] not in ("torch", "qlens"):
            return function.__name__
    return ""
