"""The layout of a loss: how it is called, found by trials on a few rows and remembered."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.probes.trial_tokens import trial_rows
from qlens.core.tokens import Tokens
from qlens.losses.graphs import NoGraphError
from qlens.losses.layout.layouts import Style
from qlens.losses.layout.past_searches import PastSearches
from qlens.losses.layout.signature import Memo, inputs, name_of
from qlens.losses.layout.style_trials import best_trial
from qlens.losses.layout.trial import Trial, attempt, changed, few, grad_of, sample, value_of
from qlens.losses.replay import Replay
from qlens.losses.side_effects import recorded_modules
from qlens.losses.user_code import LossError

PROBES = 57  # number of their rows
MOST = 2**23  # logits of the probes, beyond which fewer rows are used
SAME = 1e-6  # relative difference of equal values: factors are powers of two, exact in bfloat16 too
_STYLES = Memo()


def style_of(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Style:
    """How a loss is called, found on a few of the tokens at the first call, or on the probes if it skips these tokens.

    Raises:
        InputError: it cannot be called in any style (the error of the one in which it came furthest is named), or it returns
            nothing but zeros without a graph.
    """
    grouped = tokens.sequence is not None
    key = (repr(sorted(params.items(), key=str)), grouped, tuple(sorted(tokens.fields())), tokens.logits.shape[1])
    return _STYLES.get(fn, key, lambda: _replayed_search(fn, params, tokens), lambda trial: trial.coverage > 0).style


def in_whole_groups(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Tokens:
    """Synthetic tokens, dealt to new texts if a loss of groups of texts cannot be called on the number of theirs."""
    if tokens.sequence is None:
        return tokens
    try:
        group = style_of(fn, params, tokens).group
    except InputError:  # raised again where the loss is read
        return tokens
    number = len(tokens.sequence.unique())
    if number % group == 0:
        return tokens
    texts = group * max(1, number // group)
    return tokens.replace(sequence=torch.arange(len(tokens), device=tokens.logits.device) % texts)


def probes_like(tokens: Tokens) -> Tokens | None:
    """The probes at the tokens' vocabulary and with their fields; fewer rows at wide vocabularies, None below 4 entries."""
    from qlens.core.probes import probes

    vocabulary = tokens.logits.shape[1]
    if vocabulary < 4:
        return None
    if vocabulary > MOST // PROBES:
        return trial_rows(tokens)
    rows = probes(tokens.logits.dtype, tokens.logits.device, vocabulary)
    fields = {name: value for name, value in rows.fields().items() if name in tokens.fields()}
    if tokens.weight is not None:
        fields["weight"] = torch.ones_like(rows.logits[:, 0])
    return Tokens.unchecked(**fields)


def _replayed_search(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Trial:
    """The search, by calls that leave random generators and the state of the loss unchanged."""
    with Replay(tokens.logits.device, fn).again():
        kind = inputs(fn).kind
        if kind == "hidden":
            _check_hidden(fn, params, sample(fn, tokens))
        if kind in ("tokens", "hidden"):
            return Trial(Style(), 1.0, 1.0)
        past = PastSearches.of(fn, params, tokens)
        trial = past.matching_trial(fn, params, tokens)
        if trial is None:
            trial = _search(fn, params, tokens, past)
            past.add(trial)
        return trial


def _search(fn: Callable, params: Mapping[str, Any], tokens: Tokens, past: PastSearches) -> Trial:
    """The best trial on a few of the tokens, or on the probes if the loss skips these.

    Raises:
        InputError: as of ``style_of``.
    """
    roles = {*inputs(fn).required.values(), *inputs(fn).optional.values()}
    if {"critical", "hint"} & roles and inputs(fn).kind in ("logits", "outputs"):
        with contextlib.suppress(InputError):
            trial = best_trial(fn, params, _with_full_masks(few(trial_rows(tokens))), past)
            if trial.full:
                return trial
    best = best_trial(fn, params, sample(fn, tokens), past)
    if not best.coverage and (probes := probes_like(tokens)) is not None:
        with contextlib.suppress(InputError):  # the loss may be written for these very tokens
            on_probes = best_trial(fn, params, probes, past)
            best = on_probes if on_probes.coverage or not best.graph else best
    some = sample(fn, tokens, best.style.group)
    if not best.graph and bool(value_of(fn, params, some, best.style).any()):
        raise NoGraphError(
            f"{name_of(fn)} returns a value whose graph does not lead back to the logits, so without a gradient by them: a new "
            "tensor, as of torch.tensor(..., requires_grad=True), has none; keep the tensor that was computed from the logits"
        )
    if not best.graph:
        raise NoGraphError(
            f"{name_of(fn)} returns 0 without a graph for every token it was tried on: it skips them all, or detaches the "
            "logits; give tokens that it learns from, explain(loss, tokens), and return logits.sum() * 0 where it skips all"
        )
    reads_ids = {"model", "batch", "dict"} & {*inputs(fn).required.values()}
    return best._replace(style=_with_labels_in_ids(fn, params, some, best.style)) if reads_ids else best


def _with_full_masks(tokens: Tokens) -> Tokens:
    """The tokens with masks that hide none of them."""
    masks = {name: torch.ones_like(tokens.labels).bool() for name in ("critical", "hint") if name in tokens.fields()}
    return tokens.replace(**masks)


def _check_hidden(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> None:
    """Check that a loss of hidden states and a head depends on their product alone, by rescaling both.

    Raises:
        InputError: its value or its gradient changes.
    """
    values, grads = [], []
    for style in (Style(), Style(head=2.0)):
        with Replay(tokens.logits.device, fn).again():
            values.append(value_of(fn, params, tokens, style))
            grads.append(grad_of(fn, params, tokens, style))
    if any(_differ(*pair) for pair in (values, grads)):
        raise InputError(
            f"{name_of(fn)} depends on its hidden states or its head beyond their logits, hidden @ head.T, so that it has no "
            "logit gradient: write it as f(model, inputs), which QTrainer trains as written, or keep the part that is a "
            "function of the logits"
        )


def _differ(first: Tensor, second: Tensor) -> bool:
    """Whether the finite entries of two tensors differ beyond rounding."""
    finite = first.isfinite() & second.isfinite()
    if not bool(finite.any()):
        return False
    return bool(((first - second).abs()[finite] > SAME * first.abs()[finite].amax()).any())


def _with_labels_in_ids(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Style:
    """The style with labels as input_ids, for a loss that reads no labels but reacts to the ids."""
    every = torch.ones(len(tokens), dtype=torch.bool)
    other_labels = changed(tokens, every)
    base, other = (grad_of(fn, params, some_tokens, style) for some_tokens in (tokens, other_labels))
    if not torch.allclose(base, other):
        return style
    in_ids = replace(style, ids=True)
    with recorded_modules() as module_calls:
        try:
            trial = attempt(fn, params, tokens, in_ids)
            base, other = (grad_of(fn, params, some_tokens, in_ids) for some_tokens in (tokens, other_labels))
        except LossError:
            return style
    reacts = not torch.allclose(base, other) and trial.coverage > 0
    return in_ids if reacts and not module_calls.models else style
