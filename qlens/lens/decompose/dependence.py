"""Scope: which other tokens a token's gradient depends on, and whether a factor is detached, by perturbation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.scales import carried
from qlens.core.tokens import Tokens
from qlens.lens.decompose.batch_changes import BatchChanges, ChangedBatches
from qlens.lens.decompose.detached import finite_difference_gap, own_backward
from qlens.lens.decompose.perturbation import Perturbation, affected_tokens, change_with_number
from qlens.lens.rounding import moves, rounding

IN_PLACE = " (label ids, other orders and other numbers of tokens are not tested: the loss {})"


@dataclass(frozen=True)
class Scope:
    """What a token's gradient depends on.

    Args:
        of: "token", "sequence", "pair" or "batch".
        evidence: in words, with numbers.
        detached: whether a factor is detached, so that the gradient is not the derivative of the value; None if unknown.
        gap: relative difference of gradient and derivative.
        through: what of other tokens it depends on: "logits", "labels", "weight", ...; "losses" is how likely all of them
            are, "number" how many there are; "position" is the token's own.
        backward: the name of the loss's own autograd function, "" where it has none.
        effect: how a gradient changes as all other tokens become likely or unlikely, where no single one changes it.
    """

    of: str
    evidence: str
    detached: bool | None = None
    gap: float = 0.0
    through: tuple[str, ...] = ()
    backward: str = ""
    effect: str = ""

    def __str__(self) -> str:
        if self.detached is None:
            return f"{self.evidence}; unknown whether a factor is detached."
        if not self.detached:
            return f"{self.evidence}; no factor is detached: the gradient is the derivative of the value."
        if self.backward:
            return (
                f"{self.evidence}; its own autograd function {self.backward} has a backward that is not the derivative of "
                "its value."
            )
        return f"{self.evidence}; a factor is detached: the gradient is not the derivative of the value."


def scope(
    rows: Callable[[Tokens], Tensor],
    tokens: Tokens,
    tolerance: float = 1e-6,
    needs: Sequence[str] = (),
    precision: torch.dtype | None = None,
    ids: Mapping[int, float] | None = None,
    total: Callable[[Tokens], Tensor] | None = None,
    by_text: Sequence[str] = (),
    in_place: str = "",
) -> Scope:
    """What a token's gradient depends on, found by perturbing other tokens, their number and their order.

    A token is changed in everything that a loss may read of it: its logits and other models', its label, advantage and
    masks, its weight where the loss asks for weights. If that changes other tokens, the fields are changed one by one.

    Args:
        rows: an unreduced loss, tokens -> (N,).
        tokens: where to try it; without sequence or pair ids, any dependence on other tokens counts as "batch".
        tolerance: relative change of a gradient that counts as rounding.
        needs: fields that the loss asks for.
        precision: dtype that the loss computes in; by default estimated from the digits of the gradient.
        ids: class weights: some labels are changed to an id of another weight, the others to the next id.
        total: the sum of the unreduced loss, whose graph is searched for autograd functions of the loss's own; by default
            that of ``rows``.
        by_text: fields with one value per text, which are not changed.
        in_place: why the loss has inputs that cannot follow the tokens, "runs another model, ..."; then neither other
            labels nor other orders and numbers of tokens are tested.

    Example:
        >>> import qlens
        >>> scope(qlens.get("mile").loss, qlens.probes()).of
        'batch'
    """
    before = gradient(rows, tokens)
    moved_grads = [gradient(rows, other) for other in moves(tokens, precision or carried(before), 1)]
    noise = rounding(before, tokens, precision, moved_grads).rows
    changes = Perturbation(tokens, needs, ids or {}, by_text)
    affected = affected_tokens(rows, changes, changes.fields, before, tolerance, noise)
    detached, gap = finite_difference_gap(rows, tokens, tolerance, precision)
    backward = own_backward(total or rows, tokens) if detached else ""
    if not bool(affected.any()):
        number = ("", False) if in_place else change_with_number(rows, tokens, before, tolerance, noise)
        group = tokens.pair if tokens.pair is not None else tokens.sequence
        batch_changes = ChangedBatches(rows, tokens, before, tolerance, noise, group).changes(not in_place)
        of, evidence, through = _of_batches(batch_changes, tokens, *number, len(affected))
        if in_place:
            evidence = evidence.replace("; repeated labels; other orders", "") + IN_PLACE.format(in_place)
        return Scope(of, evidence, detached, gap, through, backward, batch_changes.losses)
    through = tuple(
        name for name in changes.fields
        if bool(affected_tokens(rows, changes, (name,), before, tolerance, noise, most=4).any())
    )  # fmt: skip
    by = f" through {' and '.join(through)}" if through and through != ("logits",) else ""
    for name in ("sequence", "pair"):
        groups = getattr(tokens, name)
        if groups is None or bool((affected & (groups[changes.rows][:, None] != groups)).any()):
            continue
        if not ChangedBatches(rows, tokens, before, tolerance, noise, groups).changes().outside:
            evidence = f"a token's gradient depends on its {name}{by}, and on nothing beyond"
            return Scope(name, evidence, detached, gap, through, backward)
    share = float(affected.double().mean())
    number = f"{share:.0%}" if share >= 0.005 else f"{float(affected.double().sum(-1).mean()):.2g}"
    evidence = f"a token's gradient depends on the batch: changing one token changes {number} of the others{by}"
    return Scope("batch", evidence, detached, gap, through, backward)


def _of_batches(
    changes: BatchChanges, tokens: Tokens, number: str, copies: bool, changed: int
) -> tuple[str, str, tuple[str, ...]]:
    """The scope where no single other token changes a gradient, with its evidence, and what it depends on."""
    reasons, through, of = [], [], "token"
    if changes.losses:
        grouped = changes.inside and not changes.outside
        of = "batch" if not grouped else "pair" if tokens.pair is not None else "sequence"
        reasons.append(f"on how likely the other labels of its {of} are: {changes.losses}")
        through.append("losses")
    if changes.labels:
        of = "batch"
        reasons.append("on whether other tokens have its label")
        through.append("labels")
    if number:
        of = "sequence" if tokens.sequence is not None and not copies and of != "batch" else "batch"
        where = "its sequence has" if of == "sequence" else "there are"
        reasons.append(f"on how many tokens {where}: {number}")
        through.append("number")
    if changes.position and not changes.labels:
        reasons.append(f"on its position: {changes.position}")
        through.append("position")
    evidence = f"a token's gradient depends {', and '.join(reasons)}"
    if of == "token":
        independent = " and on no other token" if reasons else "a token's gradient depends on no other token"
        losses = f"batches of mean loss {changes.lowest:.2g} to {changes.highest:.2g}"
        evidence = (evidence if reasons else "") + (
            f"{independent} in all that was tested ({changed} changed, one at a time; {losses}; repeated labels"
            f"{'' if reasons else '; other orders'})"
        )
    return of, evidence, tuple(through)
