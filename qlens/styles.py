"""Styles: the layout that a loss wants, found by trying all that its parameters allow."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlens.calling import call
from qlens.errors import InputError
from qlens.guards import LossError, blamed
from qlens.layouts import Layout, Style
from qlens.noticing import watched
from qlens.results import loss_of
from qlens.signature import FIELD, ROLE, Memo, inputs, name_of
from qlens.tokens import Tokens, spread

ROWS = 8  # rows that a layout is tried on
MASKED = 5  # further positions: no two sizes are alike, so that nothing broadcasts by accident
TURNED = 1e-3  # of the largest gradient: a row whose gradient turns by more reacts to a label
PER_TOKEN = ("weight", "advantage", "critical", "hint", "mask", "sequence", "old log probs", "reference log probs",
             "teacher log probs", "log probs", "teacher")  # fmt: skip
COLUMNS = {*FIELD, "mask", "position ids"} - {"chosen log probs", "rejected log probs"}
AS_GIVEN = Layout()
_STYLES = Memo()


class Trial(NamedTuple):
    """What a call in one style showed: whether supervised rows have gradient, react to their own labels, and to
    the per-token values of others."""

    style: Style
    lit: float
    reacts: float
    mislaid: bool = False

    @property
    def full(self) -> bool:
        """Whether nothing speaks against this style."""
        return self.lit == 1 and self.reacts == 1 and not self.mislaid


def style_of(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Style:
    """How a loss is called, found on a few of the tokens at the first call.

    Raises:
        InputError: it cannot be called in any style; what it raised in the likeliest is named.
    """
    grouped = tokens.sequence is not None
    key = (repr(sorted(params.items(), key=str)), grouped, tuple(sorted(tokens.fields())), tokens.logits.shape[1])
    return _STYLES.get(fn, key, lambda: _search(fn, params, few(tokens)))


def _search(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Style:
    wanted = inputs(fn)
    if wanted.kind in ("tokens", "hidden"):
        return Style()
    tried: list[Trial] = []
    failures: list[InputError] = []
    for styles in _styles(fn):
        if tried and (tried[-1].full or _contract(fn)):
            break
        works: Style | None = None  # of styles that differ in types only, the first that raises nothing
        for style in styles:
            if works is not None and dataclasses.replace(style, fields=works.fields) != works:
                continue
            try:
                tried.append(_with_columns(fn, params, tokens, style))
            except InputError as error:  # a loss may be written with qlens' own checks
                failures.append(error)
                continue
            works = style
            if tried[-1].full:
                break
    if not any(trial.lit for trial in tried) and tokens.sequence is None:
        several = [dataclasses.replace(trial.style, several=True) for trial in tried if trial.style.laid_out]
        tried += [_try(fn, params, tokens, style) for style in several]
    if not tried:
        error = next((error for error in failures if not isinstance(error, LossError)), failures[0])
        raise _of_another_size(fn, params, tokens, error)
    best = max(
        tried, key=lambda trial: (trial.lit > 0, not trial.mislaid, trial.reacts, trial.lit)
    )  # the first of equals
    return _labels_in_ids(fn, params, tokens, best.style) if wanted.kind == "model" else best.style


def _of_another_size(fn: Callable, params: Mapping[str, Any], tokens: Tokens, error: InputError) -> InputError:
    """The error of a loss that cannot be called, with what is likely where it runs a model of its own."""
    with watched(fn) as seen, contextlib.suppress(InputError):
        call(fn, params, tokens, AS_GIVEN, style=next(_styles(fn))[0])
    if not seen.started:
        return error
    return LossError(
        f"{error}; it runs another model ({seen.started[0]}), and is tried with a vocabulary of {tokens.logits.shape[1]}: if "
        "that model has another, give tokens with logits as wide as its own, explain(loss, tokens)"
    )


def _contract(fn: Callable) -> bool:
    """Whether a Trainer says how the loss is called: what does not shift then is found out, not helped."""
    return bool({"model", "outputs"} & set(inputs(fn).required.values()))


def _styles(fn: Callable) -> Iterator[list[Style]]:
    """Styles to try, the likeliest first; of each list the first that raises nothing counts."""
    wanted = inputs(fn)
    roles = set(wanted.required.values()) | set(wanted.optional.values())
    first = next(iter(wanted.required.items()))
    if "model" in roles:
        shapes = [Style("batch")]
    elif any(role.endswith("chosen log probs") for role in roles):
        shapes = [Style()]
    elif "outputs" in roles:
        shapes = [Style("batch", boxed=True), Style(), Style("batch"), Style("aligned")]
    elif "log probs" in roles and "labels" not in roles:
        shapes = [Style(), Style("aligned")]
    elif first[0].lower() in ROLE:
        shapes = [Style(), Style("batch"), Style("aligned"), Style("batch", boxed=True)]
    else:
        shapes = [Style(), Style("batch"), Style("aligned"), Style("batch", boxed=True), Style("aligned", boxed=True)]
    masked = "mask" in roles
    texts = any(ROLE.get(name) == "input ids" for name, role in wanted.required.items() if role == "labels")
    attended = "attention mask" in roles
    flags = [torch.float32, torch.bool, torch.long] if masked or attended else [torch.float32]
    others = set(wanted.optional.values())
    optional = [True, False] if others - {"count"} else [True]
    counted = [False, True] if "count" in others else [False]
    for shape in shapes:
        places = ["labels"]
        if shape.laid_out and roles & set(PER_TOKEN):
            places = ["labels", "logits", "shifted", "rows"] if shape.shape == "batch" else ["logits", "rows"]
            places += ["texts"] if {"advantage", "weight"} & roles else []
        cleans = [False, True] if attended or texts else [False]
        if masked:
            cleans = [False, True] if shape.shape == "batch" else [True, False]
        for inverted in (False, True) if masked else (False,):
            yield [
                dataclasses.replace(
                    shape, optional=given, fields=place, clean=clean, flag=flag, inverted=inverted, counted=count
                )
                for given in optional
                for count in counted
                for clean in cleans
                for flag in flags
                for place in places
            ]


def _try(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Trial:
    """One style on a few rows: their gradients, and which of them turn as every third label changes.

    Raises:
        LossError: the loss raised.
    """
    layout = Layout(masked=MASKED) if inputs_masked(fn) or style.laid_out else Layout()
    base = grad_of(fn, params, tokens, style, layout)
    size = base.norm(dim=-1)
    if not bool(base.isfinite().all()) or not bool(size.any()):
        return Trial(style, 0.0, 0.0)
    lit = float((size > 0).double().mean())
    mislaid = _mislaid(fn, params, tokens, style, layout, base)
    if lit < 1:  # a maximum over a text, say: the few rows that have gradient are asked one by one
        return Trial(style, lit, _own_labels(fn, params, tokens, style, layout, base), mislaid)
    some = torch.arange(len(tokens)) % 3 == 1
    turned = across(grad_of(fn, params, changed(tokens, some), style, layout), base) > TURNED * float(size.max())
    mine = some.to(turned.device) & (size > 0)
    if not bool(turned.any()) or not bool(mine.any()):
        return Trial(style, lit, float(not bool(turned.any())), mislaid)
    return Trial(style, lit, float(turned[mine].double().mean()), mislaid)


def _own_labels(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, layout: Layout, base: Tensor
) -> float:
    """Of the rows with gradient, the share whose gradient changes with their own label."""
    rows, reacts = base.norm(dim=-1).nonzero()[:, 0].tolist(), 0
    for row in rows:
        after = grad_of(fn, params, changed(tokens, torch.arange(len(tokens)) == row), style, layout)
        reacts += bool((after - base)[row].norm() > TURNED * base[row].norm())
    return reacts / len(rows)


def _with_columns(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Trial:
    """One style, with the further columns of a model's inputs that the loss asks for.

    Raises:
        InputError: it asks for a column that no field of the tokens is.
    """
    while True:
        try:
            return _try(fn, params, tokens, style)
        except LossError as error:
            cause = error.__cause__
            name = str(cause.args[0]) if isinstance(cause, KeyError) and cause.args else ""
            if inputs(fn).kind != "model" or not name or name in style.columns:
                raise
            if ROLE.get(name) not in COLUMNS:
                raise InputError(
                    f"{name_of(fn)} reads inputs[{name!r}], which qlens cannot fill: it gives input_ids, attention_mask, "
                    f"labels, and teacher_logits, weight, advantage, mask and the like; read it with "
                    f"inputs.get({name!r}) and a default of your own"
                ) from error
            style = dataclasses.replace(style, columns=(*style.columns, name))


def inputs_masked(fn: Callable) -> bool:
    """Whether a loss takes a mask that tells supervised rows."""
    wanted = inputs(fn)
    return "mask" in wanted.required.values() or "mask" in wanted.optional.values()


def _mislaid(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, layout: Layout, base: Tensor
) -> bool:
    """Whether a per-token value moves the gradient of other rows than its own: it stands at another place, or is broadcast."""
    wanted = inputs(fn)
    fields = {FIELD.get(role) for role in (*wanted.required.values(), *wanted.optional.values())}
    fields |= {FIELD.get(ROLE[name]) for name in style.columns}
    last = torch.arange(len(tokens), device=base.device) >= len(tokens) // 2 - 1  # the second text, where there are two
    one = torch.arange(len(tokens), device=base.device) == 1
    for field in fields & {"weight", "advantage"}:
        value = getattr(tokens, str(field))
        if value is None and field == "weight":
            value = torch.ones(len(tokens), dtype=base.dtype, device=base.device)
        if value is None:
            continue
        for rows in (last,) if style.fields == "texts" else (last, one):
            other = tokens.replace(**{str(field): torch.where(rows, 3 * value + 1, value)})
            moved = (grad_of(fn, params, other, style, layout) - base).norm(dim=-1)
            seen = moved > TURNED * float(base.norm(dim=-1).max())
            if bool(seen[~rows].any()):
                return True
    return False


def changed(tokens: Tokens, rows: Tensor) -> Tokens:
    """The tokens with other labels in the given rows."""
    other = (tokens.labels + 1) % tokens.logits.shape[1]
    return tokens.replace(labels=torch.where(rows.to(other.device), other, tokens.labels))


def across(grad: Tensor, base: Tensor) -> Tensor:
    """The size of every row's part of ``grad`` at right angles to ``base``, (N,)."""
    along = (grad * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True)
    return (grad - torch.where(along.isfinite(), along, 0.0) * base).norm(dim=-1)


def grad_of(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style | None = None, layout: Layout = AS_GIVEN
) -> Tensor:
    """The gradient of the summed loss on the first copy of every row, all copies added up as one row would be, (N, V).

    Raises:
        LossError: the loss, or its backward, raised.
        InputError: it returns nothing that has a gradient.
    """
    with torch.enable_grad():
        leaf = tokens.logits.detach().clone().requires_grad_()
        made = call(fn, params, tokens.with_logits(leaf), layout, style=style)
        value = loss_of(made, name_of(fn)).value
        if not value.requires_grad:
            raise LossError(
                f"{name_of(fn)} returned a value without a graph, so without a gradient: the logits are detached somewhere inside"
            )
        with blamed(name_of(fn)):
            (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    return torch.zeros_like(leaf) if grad is None else grad / layout.copies


def few(tokens: Tokens) -> Tokens:
    """A few rows in two sequences, one of which is chosen, where the tokens have sequences and pairs at all."""
    index = spread(len(tokens), ROWS).to(tokens.logits.device)
    if len(index) < ROWS:
        index = index.repeat(ROWS)[:ROWS]
    some = tokens[index]
    second = torch.arange(ROWS, device=index.device) >= ROWS // 2 - 1
    given = {"sequence": second.long(), "pair": torch.zeros_like(index), "chosen": ~second}
    return some.replace(**{name: value for name, value in given.items() if getattr(tokens, name) is not None})


def _labels_in_ids(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Style:
    """The style with input_ids that are the labels, for a loss that reads no labels of its own but reacts to the ids."""
    base = grad_of(fn, params, tokens, style)
    other = grad_of(fn, params, changed(tokens, torch.ones(len(tokens), dtype=torch.bool)), style)
    if not torch.allclose(base, other):
        return style
    taken = dataclasses.replace(style, ids=True)
    with watched() as seen:
        try:
            trial = _try(fn, params, tokens, taken)
            base = grad_of(fn, params, tokens, taken)
            other = grad_of(fn, params, changed(tokens, torch.ones(len(tokens), dtype=torch.bool)), taken)
        except LossError:
            return style
    reacts = not torch.allclose(base, other) and trial.lit > 0
    return taken if reacts and not seen.models else style
