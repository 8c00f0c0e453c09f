"""Adapters: any loss as somebody writes it, as rows of an unreduced loss; its reduction found and undone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlens.calling import Layout, call, inputs, kind, takes
from qlens.draws import Replay
from qlens.errors import InputError
from qlens.layouts import Counts, Style, counts, sequences
from qlens.results import loss_of
from qlens.signature import settings_of
from qlens.styles import few, grad_of, inputs_masked, style_of
from qlens.target import Target
from qlens.tokens import Tokens, spread
from qlens.trial_tokens import trial_rows

FOUND_ON = 8  # rows: enough to see how a loss divides, few enough to be free
ROUNDING = 1e3  # units of rounding below which a gradient that no count explains is none
ALIKE = 0.01  # gradients this near are one gradient: losses may compute in bfloat16, and counts differ by far more

# What a scalar loss may have divided by, of the rows and the layout they were shown in; a tensor (N,) is a number for each row.
REDUCTIONS: dict[str, Callable[[Counts], Any]] = {
    "sum": lambda c: 1,
    "mean over unmasked": lambda c: c.rows,
    "mean over all": lambda c: c.positions,
    "mean over all, the unused last position included": lambda c: c.columns,
    "mean over all but padding": lambda c: c.attended,
    "sum of each text, mean over texts": lambda c: c.texts,
    "mean of each text, mean over texts": lambda c: c.texts * c.own,
    "mean of each text, sum over texts": lambda c: c.own,
}


class Unreduced:
    """A loss with its reduction undone, as a function of tokens.

    Its rows as they are; of a scalar, rows that add up to the sum of what it reduced. A scalar's reduction is found at the first
    call on rows that have a gradient.

    Args:
        fn: the loss.
        params: its parameters.
        name: what messages call it.
    """

    def __init__(self, fn: Callable, params: dict[str, Any], name: str):
        self.fn, self.params, self.name = fn, params, name
        self.known = ""  # the reduction, a key of REDUCTIONS
        self.settings: tuple = ()  # under which it was found

    def rows(self, tokens: Tokens, weight: Tensor | None = None) -> Any:
        """The loss of every row, (N,), times its weight; what a tokens function returns that is no tensor is handed on.

        Every row of a loss that reduces itself has the gradient of its own logits, and an equal share of the sum of the rows that
        weigh alike.

        Raises:
            InputError: rows of a loss that reduces itself weigh differently, and depend on each other.
        """
        made = self(tokens)
        if not isinstance(made, Tensor):
            return made
        if made.ndim:
            return made if weight is None else made * weight
        if weight is None or not len(tokens):
            return _shared(made, tokens.logits)
        weighted = _shared(made, tokens.logits) * weight
        return weighted + (self._by_weight(tokens, weight, made.detach()) - weighted.detach())

    def __call__(self, tokens: Tokens) -> Any:
        """Rows (N,), or a scalar that is their sum."""
        if not len(tokens):
            return tokens.logits[:, :0].sum(-1)  # no rows, but a graph
        style = self.style(tokens)
        made = call(self.fn, self.params, tokens, Layout(), style=style)
        if kind(self.fn) == "tokens" and isinstance(made, Target):
            return made
        made = loss_of(made, self.name).value
        if made.ndim and made.numel() == len(tokens) and not style.laid_out:
            return made.reshape(-1)
        if made.ndim and not style.laid_out and not (pairwise(self.fn) or made.ndim == 1):
            raise InputError(
                f"{self.name} returned shape {tuple(made.shape)} for {len(tokens)} tokens: it must be () or (N,)"
            )
        if made.ndim:  # what is unreduced over texts, pairs or positions leaves nothing to undo
            return made.sum()
        divisor = REDUCTIONS[self.reduction(tokens)](counts(tokens, Layout(), style, pairwise(self.fn)))
        return self._by_text(tokens, style, made) if isinstance(divisor, Tensor) else made * divisor

    def style(self, tokens: Tokens) -> Style:
        """How the loss is called, remembered; what is tried first does not change what a loss draws."""
        with Replay(tokens.logits.device).again():
            return style_of(self.fn, self.params, tokens)

    def reduction(self, tokens: Tokens) -> str:
        """How a scalar loss divides, a key of ``REDUCTIONS``; "sum" as long as no row has had a gradient."""
        settings = settings_of(self.fn)
        if not self.known or settings != self.settings:
            self.settings = settings
            with Replay(tokens.logits.device).again():
                self.known = _reduction(self.fn, self.params, tokens, self.name)
        return self.known or "sum"

    def _by_text(self, tokens: Tokens, style: Style, made: Tensor) -> Tensor:
        """The sum over tokens of a loss that is a mean of each text: of every text alone, times its tokens."""
        sequence = sequences(tokens, style, Layout())
        whole = self._alone(tokens, sequence, style)
        sizes = [int((sequence == each).sum()) for each in sequence.unique()]
        return add_up(whole, sizes, made, self.known, self.name)

    def _alone(self, tokens: Tokens, groups: Tensor, style: Style) -> list[Tensor]:
        """The value of the loss on every group of rows alone, as it was written."""
        given = [tokens[groups == each] for each in groups.unique()]
        return [loss_of(call(self.fn, self.params, some, Layout(), style=style), self.name).value for some in given]

    def _by_weight(self, tokens: Tokens, weight: Tensor, total: Tensor) -> Tensor:
        """Rows' values times their weights, (N,): those that weigh alike are called together, and share their sum."""
        if bool((weight == weight[0]).all()):
            return total * weight / len(tokens)
        values, summed = torch.zeros_like(weight, dtype=total.dtype), torch.zeros_like(total)
        with torch.no_grad(), Replay(tokens.logits.device).again():
            for each in weight.unique():
                mine = weight == each
                part = self(tokens[mine]).sum()
                values[mine] = part * each.to(part) / mine.sum()
                summed += part
        if not (summed - total).abs() <= ALIKE / 10 * total.abs().clamp(min=1e-6 * len(tokens)):
            raise InputError(
                f"{self.name} reduces itself, and its rows depend on each other ({float(total):.6g} together, "
                f"{float(summed):.6g} apart), so that they cannot be weighted: return the unreduced loss (N,), or take weight as "
                "an argument"
            )
        return values


def add_up(parts: list[Tensor], sizes: list[int], made: Tensor, reduction: str, name: str) -> Tensor:
    """The sum over tokens of a loss that is a mean of each text, from its value on every text alone.

    Raises:
        InputError: the texts alone do not add up to the loss of the batch.
    """
    total = torch.stack(parts).sum()
    mean = total / len(parts) if reduction.endswith("mean over texts") else total
    if not (mean - made).detach().abs() <= ALIKE / 10 * made.detach().abs().clamp(min=1e-6):
        raise InputError(
            f"{name} is a {reduction}, but its texts depend on each other ({float(made):.6g} together, {float(mean):.6g} apart), "
            "so that its reduction cannot be undone: return the unreduced loss"
        )
    return torch.stack([part * size for part, size in zip(parts, sizes, strict=True)]).sum()


def pairwise(fn: Callable) -> bool:
    """Whether a loss is one of pairs, given the summed log-probabilities of chosen and rejected sequences."""
    return any(role.endswith("chosen log probs") for role in inputs(fn).required.values())


def _shared(total: Tensor, logits: Tensor) -> Tensor:
    """Rows that add up to ``total``, each with the gradient of its own logits and no other's: so that rows can be weighted."""
    value = (total.detach() / len(logits)).expand(len(logits))
    if not total.requires_grad:
        return value
    (grad,) = torch.autograd.grad(total, logits)
    zero = torch.where(logits.isfinite(), logits - logits.detach(), 0.0)
    return value + (grad * zero).sum(-1)


def find_reduction(fn: Callable, params: dict[str, Any], tokens: Tokens, name: str) -> str:
    """How a scalar loss divides: the one count by which its gradient on the same rows is the same in every layout.

    Raises:
        InputError: no count explains it, or two calls on the same rows differ.
    """
    return _reduction(fn, params, tokens, name) or "sum"


def _reduction(fn: Callable, params: dict[str, Any], tokens: Tokens, name: str) -> str:
    """``find_reduction``, "" where no row that was tried has a gradient."""
    style = style_of(fn, params, tokens)
    own = few(tokens) if pairwise(fn) else _spread(tokens)
    for rows_shown in (few(trial_rows(tokens)), own):
        try:
            base = grad_of(fn, params, rows_shown, style)
        except InputError:  # it is written for its own data
            if rows_shown is own:
                raise
            continue
        if (
            base.isfinite().all() and base.abs().max() > 0
        ):  # a loss that skips these rows tells nothing about its division
            break
    else:
        return ""
    if _misfit([base, grad_of(fn, params, rows_shown, style)]) > ALIKE:
        raise InputError(
            f"{name} is not deterministic: two calls on the same tokens differ. Seed it, or switch dropout off."
        )
    misfits: dict[str, float] = {}
    grads: list[Tensor] = []
    for interleave in (False, True) if style.laid_out else (False,):
        layouts = [Layout(), Layout(2, 0, False, interleave), Layout(3, 0, False, interleave)]
        if style.laid_out or inputs_masked(fn):
            layouts += [Layout(1, 7), Layout(2, 12, False, interleave)]
        grads = [grad_of(fn, params, rows_shown, style, layout) for layout in layouts]
        for reduction in REDUCTIONS:
            off = _misfit(_multiplied(reduction, fn, grads, rows_shown, layouts, style))
            misfits[reduction] = min(off, misfits.get(reduction, off))
    best = min(misfits, key=misfits.__getitem__)
    alike = [reduction for reduction, off in misfits.items() if off <= max(ALIKE / 100, 2 * misfits[best])]
    if misfits[best] <= ALIKE:
        if style.laid_out and takes(fn, "attention mask"):
            alike = _with_prompts(alike, fn, params, rows_shown, style)
        of_any_length = by_length(alike, fn, params, rows_shown, style) if style.laid_out and len(alike) > 1 else ""
        return of_any_length or (alike[0] if len(alike) > 1 else best)
    if float(grads[0].abs().max()) < ROUNDING * torch.finfo(grads[0].dtype).eps:
        return "sum"  # nothing but rounding: there is no gradient to be divided
    ratio = float(grads[1].norm() / grads[0].norm())
    raise InputError(
        f"{name}: its reduction could not be found: with every row shown twice, a row's gradient changes by a factor "
        f"{ratio:.4g}, where a sum gives 1 and a mean 0.5. Return the unreduced loss (N,) instead."
    )


def _with_prompts(alike: list[str], fn: Callable, params: dict[str, Any], tokens: Tokens, style: Style) -> list[str]:
    """Those of these reductions that hold for texts with a prompt too; all of them where none does."""
    layouts = [Layout(), Layout(before=3)]
    grads = [grad_of(fn, params, tokens, style, layout) for layout in layouts]
    held = [name for name in alike if _misfit(_multiplied(name, fn, grads, tokens, layouts, style)) <= ALIKE]
    return held or alike


def by_length(alike: list[str], fn: Callable, params: dict[str, Any], tokens: Tokens, style: Style) -> str:
    """The one of these reductions that holds for texts of unequal lengths too; "" where none does."""
    layouts = [Layout(), Layout(split=True)]
    try:
        grads = [grad_of(fn, params, tokens, style, layout) for layout in layouts]
    except InputError:  # a loss of pairs, say, takes no texts in other numbers
        return ""
    off = {name: _misfit(_multiplied(name, fn, grads, tokens, layouts, style)) for name in alike}
    best = min(off, key=off.__getitem__)
    return best if off[best] <= ALIKE else ""


def _multiplied(
    reduction: str, fn: Callable, grads: list[Tensor], tokens: Tokens, layouts: list[Layout], style: Style
) -> list[Tensor]:
    """Gradients in several layouts, each multiplied by what this reduction divides by there."""
    made = []
    for grad, layout in zip(grads, layouts, strict=True):
        divisor = REDUCTIONS[reduction](counts(tokens, layout, style, pairwise(fn)))
        made.append(grad * (divisor.to(grad)[:, None] if isinstance(divisor, Tensor) else divisor))
    return made


def _spread(tokens: Tokens) -> Tokens:
    """A few rows from all over."""
    return tokens[spread(len(tokens), FOUND_ON).to(tokens.logits.device)]


def _misfit(grads: list[Tensor]) -> float:
    """How far gradients that should be one are apart, as a share of the first."""
    return max(float((grad - grads[0]).norm() / grads[0].norm()) for grad in grads[1:])
