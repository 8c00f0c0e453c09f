"""Rule on labels: a row learns the token that its label names."""

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from qlens.conformance.harness import PER_TEXT, Specimen
from qlens.conformance.rules.rule import Failed, NotApplicable, Remark, relative, rule
from qlens.conformance.synthetic_batches import cut, relabelled
from qlens.core.errors import InputError
from qlens.core.tokens import MODELS, Tokens
from qlens.losses.layout.names import FIELD
from qlens.losses.layout.trial import across
from qlens.losses.side_effects import recorded_modules

STEP = 7  # by which a label is changed
MOST = 0.9  # of the rows that must agree
MAJOR = 0.5  # of a change, in two columns
MINOR = 0.1
FOLLOWS = 1e-3  # of its gradient: a row that turns by less does not follow its label


class Reaction(NamedTuple):
    """Gradients before and after some labels changed, and the rows whose label changed."""

    tokens: Tokens
    before: Tensor
    after: Tensor
    changed: Tensor

    @property
    def new_labels(self) -> Tensor:
        """The labels after the change."""
        return torch.where(self.changed, (self.tokens.labels + STEP) % self.before.shape[1], self.tokens.labels)


@rule("the labels of the data are not learned", compares=False)
def labels(loss: Specimen) -> str:
    """The token that a label names is the one that its row learns."""
    if not _takes_labels(loss):
        raise NotApplicable("it takes no labels")
    reaction = _reaction(loss)
    if not _any_row_turns(reaction):
        raise _without_labels(loss, reaction)
    if (offset := _offset(reaction)) is not None:
        raise Failed(
            f"where the label is y, a row learns token y{offset:+d} (counted around the vocabulary of {loss.vocabulary})",
            "the model is trained on another token than the label",
        )
    if _another_column(reaction):
        raise Remark("the label decides which token is learned, but it is another token than the label")
    return f"a row's gradient follows which token its label is: {int(reaction.changed.sum())} labels changed"


def _takes_labels(loss: Specimen) -> bool:
    """Whether labels are among what it is given."""
    label_inputs = {"labels", "batch", "dict"} & set(loss.roles.values())
    return loss.kind == "tokens" or bool(label_inputs) or "log probs" in loss.roles.values()


def _reaction(loss: Specimen) -> Reaction:
    """Every third label is changed, in calls with the same random draws; input ids stay, so that another model sees the same.

    Raises:
        NotApplicable: calls on the same input differ all the same.
    """
    tokens = loss.tokens()
    changed = torch.arange(len(tokens)) % 3 == 1
    new = torch.where(changed, (tokens.labels + STEP) % loss.vocabulary, tokens.labels)
    readings = []
    for labels in (tokens.labels, tokens.labels, new):
        torch.manual_seed(0)
        readings.append(_read(loss, tokens, labels))
    if relative(readings[1], readings[0]) > loss.tolerance:
        raise NotApplicable("two calls on the same input differ, whatever the labels")
    return Reaction(tokens, readings[0], readings[2], changed)


def _read(loss: Specimen, tokens: Tokens, labels: Tensor) -> Tensor:
    """The gradient of every row with these labels, (N, V)."""
    if not loss.laid_out:
        return loss.read(tokens.replace(labels=labels)).grad
    texts = cut(tokens, PER_TEXT)
    parts = labels.split(PER_TEXT)
    texts = [relabelled(text, torch.cat([text.labels[:1], own])) for text, own in zip(texts, parts, strict=True)]
    grad = loss.read_batch(texts, len(tokens)).grad
    return grad[torch.cat([torch.arange(len(text.labels)) < len(text.labels) - 1 for text in texts])]


def _any_row_turns(reaction: Reaction) -> bool:
    """Whether a label changes the direction of any gradient; one that only grows or shrinks has another weight."""
    size = reaction.after.norm(dim=-1)
    learning = (size > FOLLOWS * size.max()) & reaction.before.any(-1)
    turned = (across(reaction.after, reaction.before) > FOLLOWS * size) & learning
    return bool(turned.any()) or bool((reaction.before.any(-1) != reaction.after.any(-1)).any())


def _without_labels(loss: Specimen, reaction: Reaction) -> Exception:
    """The outcome for a loss whose rows follow no label."""
    reweighted = float((reaction.after - reaction.before).abs().max()) > loss.tolerance * float(
        reaction.before.abs().max()
    )
    effect = (
        "changing a label changes how much its row learns, not what"
        if reweighted
        else "changing a label changes no gradient"
    )
    models = _other_models(loss)
    learned = _learned_token(reaction)
    if learned is not None:
        best = reaction.tokens.logits.argmax(-1)
        for name, ids in (*_best_of(reaction.tokens, models), ("student", best)):
            if bool((learned == ids).double().mean() >= MOST):
                evidence = (
                    f"every row learns the {name}'s own most probable token (its argmax), not its label: {effect}"
                )
                return Failed(evidence) if name == "student" else Remark(evidence)
        if len(learned.unique()) == 1:
            return Failed(f"every row learns token {int(learned[0])}, not its label: {effect}")
    if models:
        return NotApplicable(f"it learns from {' and '.join(models)} alone: {effect}")
    return Failed(f"its labels are ignored: {effect}, and it learns from no other model either")


def _best_of(tokens: Tokens, names: Iterable[str]) -> list[tuple[str, Tensor]]:
    """The most probable token of every row, by each of these models."""
    logits = {name: getattr(tokens, name) for name in MODELS if name in names}
    return [(name, value.argmax(-1)) for name, value in logits.items() if value is not None]


def _learned_token(reaction: Reaction) -> Tensor | None:
    """The token k of every row whose gradient is a (p - one-hot(k)), of the rows that have one; None where most are not so."""
    grad, probs = reaction.before.double(), reaction.tokens.logits.double().softmax(-1)
    token = grad.argmin(-1)
    pull = probs.scatter_add(1, token[:, None], torch.full_like(token, -1, dtype=probs.dtype)[:, None])
    parallel = across(grad, pull) <= FOLLOWS * grad.norm(dim=-1)
    if not bool(parallel.double().mean() >= MOST):
        return None
    return token.masked_fill(~parallel, -1)


def _other_models(loss: Specimen) -> list[str]:
    """The other models that a loss may learn from: among its inputs, or run by itself."""
    fields = {FIELD.get(role, role) for role in loss.roles.values()} | set(loss.fields) | set(loss.variant.needs)
    fields |= {role for name in loss.style.columns for role in MODELS if role in name}
    names = [name for name in MODELS if name in fields]
    with recorded_modules(loss.fn) as module_calls, contextlib.suppress(InputError):
        loss.read(loss.tokens())
    return [*names, *(f"another model ({name})" for name in module_calls.models)]


def _offset(reaction: Reaction) -> int | None:
    """By how much the token that is learned is off its label, the same in all rows; None where it is the label, or nothing so."""
    vocabulary = reaction.before.shape[1]
    rows = _reacting(reaction)
    change = (reaction.after - reaction.before).abs()[rows]
    old, new = reaction.tokens.labels[rows], reaction.new_labels[rows]
    if not len(rows) or bool((_share(change, old, new) > MINOR).any()):
        return None
    first = change[0].topk(2).indices
    for off in sorted({int((k - old[0]) % vocabulary) for k in first} - {0}, key=lambda k: min(k, vocabulary - k)):
        shares = _share(change, (old + off) % vocabulary, (new + off) % vocabulary)
        if bool((shares >= MAJOR).all()):
            return off if off <= vocabulary // 2 else off - vocabulary
    return None


def _another_column(reaction: Reaction) -> bool:
    """Whether two other columns than the old and the new label's hold the change of most rows."""
    rows = _reacting(reaction)
    change = (reaction.after - reaction.before).abs()[rows]
    if not len(rows):
        return False
    beside = _share(change, reaction.tokens.labels[rows], reaction.new_labels[rows]) < MINOR
    sharp = change.topk(2).values.sum(-1) >= MAJOR * change.sum(-1)
    return bool((beside & sharp).double().mean() >= MOST)


def _reacting(reaction: Reaction) -> Tensor:
    """The rows whose own label changed and whose gradient did."""
    moved = (reaction.after - reaction.before).norm(dim=-1) > FOLLOWS * float(reaction.before.norm(dim=-1).max())
    return (moved & reaction.changed).nonzero()[:, 0]


def _share(change: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Which share of every row's change is in two columns."""
    both = change.gather(1, torch.stack([old, new], 1)).sum(-1)
    return both / change.sum(-1)
