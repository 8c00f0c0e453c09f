"""Styles: the layout that a loss wants, found by trying all that its parameters allow."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.core.trial_tokens import trial_rows
from qlens.losses.calling import call
from qlens.losses.graphs import NoGraphError
from qlens.losses.layout import candidates
from qlens.losses.layout.layouts import Style
from qlens.losses.layout.names import FIELD, role_of
from qlens.losses.layout.pairing import paired, pairing
from qlens.losses.layout.signature import Memo, inputs, name_of, seen_as, signature
from qlens.losses.layout.trial import (
    AS_GIVEN,
    Trial,
    attempt,
    attempt_at_widths,
    changed,
    few,
    grad_of,
    texts_of,
)
from qlens.losses.layout.wording import described
from qlens.losses.replay import Replay
from qlens.losses.return_values import loss_of
from qlens.losses.side_effects import watched
from qlens.losses.user_code import EndedError, LossError, depth, file_of, first_line, numbers_of

COLUMNS = {*FIELD, "mask", "position ids", "labels", "logits", "outputs"} - {"chosen log probs", "rejected log probs"}
PROBES = 57  # their rows
MOST = 2**23  # logits of the probes, where the tokens themselves show nothing
SAME = 1e-6  # of the largest: factors are powers of two, so that even bfloat16 computes the same
TEXTS = (8, 48, 20)  # texts of a batch, tried where a loss fails on two: 2, 3, 4, 5, 6, 8, 10, 12, 16 are divisors
MOST_TEXTS, NAMED = 64, 3  # of a group whose size an error names; errors that are read, and numbers of texts tried
_STYLES = Memo()
_PAST = Memo()


class Past:
    """What searches at other vocabularies, or with other fields, showed of a loss.

    Attributes:
        found: the trials of the styles that were taken.
        refused: the error of the last search that found none, or None.
        failures: of every layout, and of every error beside its numbers, the first style that raised it.
    """

    def __init__(self):
        self.found: list[Trial] = []
        self.refused: InputError | None = None
        self.failures: dict[tuple, Style] = {}

    def refuse(self, error: InputError, failures: list[tuple[InputError, Style]]) -> None:
        """Keep what a search raised that found no style."""
        self.refused, self.failures = error, {}
        for failure, style in failures:
            self.failures.setdefault((_layout_of(style), _text(failure)), style)


def _layout_of(style: Style) -> tuple:
    return style.shape, style.boxed, style.order, style.container, style.chunks > 0, style.pairs, style.alike


def _text(error: InputError) -> str:
    """What a loss raised, without the numbers in it, which change with the vocabulary."""
    cause = error.__cause__
    return re.sub(r"\d+", "", str(error) if cause is None else f"{type(cause).__name__}: {first_line(cause)}")


def style_of(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Style:
    """How a loss is called, found on a few of the tokens at the first call; on the probes, where it skips these tokens.

    Raises:
        InputError: it cannot be called in any style, and what it raised in the one that came furthest is named; or it
            returns nothing but zeros without a graph.
    """
    grouped = tokens.sequence is not None
    key = (repr(sorted(params.items(), key=str)), grouped, tuple(sorted(tokens.fields())), tokens.logits.shape[1])
    return _STYLES.get(fn, key, lambda: _found(fn, params, tokens), lambda found: found.lit > 0).style


def in_whole_groups(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Tokens:
    """Made-up tokens dealt to whole groups of texts anew, for a loss of groups that their texts do not make up."""
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


def _found(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Trial:
    """The style, found by calls that leave what a loss draws and keeps as it was."""
    with Replay(tokens.logits.device, fn).again():
        return _search(fn, params, tokens)


def _search(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Trial:
    wanted = inputs(fn)
    if wanted.kind == "hidden":
        _check_hidden(fn, params, few(tokens))
    if wanted.kind in ("tokens", "hidden"):
        return Trial(Style(), 1.0, 1.0)
    past = _PAST.get(fn, (repr(sorted(params.items(), key=str)), tokens.sequence is not None), Past)
    if (again := _as_before(fn, params, tokens, past)) is not None:
        return again
    found = _searched(fn, params, tokens, past)
    past.found += [found] if found.lit > 0 else []
    return found


def _as_before(fn: Callable, params: Mapping[str, Any], tokens: Tokens, past: Past) -> Trial | None:
    """A trial of a style that was found before, if it fits these tokens too.

    Raises:
        InputError: no style was found before, and the loss raises the same as then.
    """
    for before in past.found:
        with contextlib.suppress(InputError):
            trial = attempt_at_widths(fn, params, few(tokens, before.style.group), before.style)
            steady = trial.reacts == 1 and not trial.flattened and trial.mislaid == before.mislaid
            if trial.full or (trial.lit > 0 and steady):
                return trial
    if past.refused is None:
        return None
    for (_, text), style in past.failures.items():
        try:
            attempt(fn, params, few(tokens), style)
        except InputError as error:
            if _text(error) == text:
                continue
        return None
    raise _told(past.refused, "", "")


def _searched(fn: Callable, params: Mapping[str, Any], tokens: Tokens, past: Past) -> Trial:
    """The best of all styles, on a few of the tokens, or on the probes if the loss skips these.

    Raises:
        InputError: as of ``style_of``.
    """
    wanted, some = inputs(fn), few(tokens)
    masks = {"critical", "hint"} & {*wanted.required.values(), *wanted.optional.values()}
    if masks and wanted.kind in ("logits", "outputs"):  # a mask may hide most rows: first with none hidden
        with contextlib.suppress(InputError):
            trial = few(trial_rows(tokens))
            shown = {
                name: torch.ones_like(trial.labels).bool() for name in ("critical", "hint") if name in trial.fields()
            }
            on_all = _best(fn, params, trial.replace(**shown), past)
            if on_all.full:
                return on_all
    found = _best(fn, params, some, past)
    if not found.lit and (others := probes_like(tokens)) is not None:
        with contextlib.suppress(InputError):  # a loss may be made for these very tokens
            on_probes = _best(fn, params, others, past)
            found = on_probes if on_probes.lit or not found.graph else found
    some = few(tokens, found.style.group)
    if not found.graph and bool(_value(fn, params, some, found.style).any()):
        raise NoGraphError(
            f"{name_of(fn)} returns a value whose graph does not lead back to the logits, so without a gradient by them: a new "
            "tensor, as of torch.tensor(..., requires_grad=True), has none; keep the tensor that was computed from the logits"
        )
    if not found.graph:
        raise NoGraphError(
            f"{name_of(fn)} returns 0 without a graph for every token it was tried on: it skips them all, or detaches the "
            "logits; give tokens that it learns from, explain(loss, tokens), and return logits.sum() * 0 where it skips all"
        )
    reads_ids = {"model", "batch", "dict"} & {*wanted.required.values()}
    return found._replace(style=_labels_in_ids(fn, params, some, found.style)) if reads_ids else found


def _check_hidden(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> None:
    """Whether a loss of hidden states and a head is a function of their logits: tried with others of the same logits.

    Raises:
        InputError: its value or gradient is another one.
    """
    styles = (Style(), Style(head=2.0))
    values, grads = [], []
    for style in styles:
        with Replay(tokens.logits.device, fn).again():
            values.append(_value(fn, params, tokens, style))
            grads.append(grad_of(fn, params, tokens, style))
    for one, other in (values, grads):
        both = one.isfinite() & other.isfinite()
        if bool(((one - other).abs()[both] > SAME * one.abs()[both].amax()).any() if both.any() else False):
            raise InputError(
                f"{name_of(fn)} depends on its hidden states or its head beyond their logits, hidden @ head.T, so that it has no "
                "logit gradient: write it as f(model, inputs), which QTrainer trains as written, or keep the part that is a "
                "function of the logits"
            )


def _value(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> torch.Tensor:
    """What the loss returns for these tokens."""
    shown = tokens.with_logits(tokens.logits.detach().clone().requires_grad_())
    return loss_of(call(fn, params, shown, AS_GIVEN, style=style), name_of(fn)).value.detach()


def probes_like(tokens: Tokens) -> Tokens | None:
    """The probes at the tokens' vocabulary, with no more fields than these have; fewer rows where they would be too large."""
    from qlens.core.probes import probes

    vocabulary = tokens.logits.shape[1]
    if vocabulary < 4:
        return None
    if vocabulary > MOST // PROBES:
        return trial_rows(tokens)
    made = probes(tokens.logits.dtype, tokens.logits.device, vocabulary)
    given = {name: value for name, value in made.fields().items() if name in tokens.fields()}
    if tokens.weight is not None:
        given["weight"] = torch.ones_like(made.logits[:, 0])
    return Tokens.unchecked(**given)


def _best(fn: Callable, params: Mapping[str, Any], tokens: Tokens, past: Past) -> Trial:
    """What speaks for the best style; of a loss that takes pairs by their places in a batch, one that lays them out so.

    Raises:
        InputError: it cannot be called in any.
    """
    tried: list[Trial] = []
    failures: list[tuple[InputError, Style]] = []
    if tokens.pair is not None and tokens.chosen is not None and (how := pairing(fn, params)):
        _try_all(fn, params, tokens, paired(fn, how), tried, failures)
        if any(trial.lit for trial in tried):
            return max(tried, key=_speaks)
        tried.clear()
    listed = candidates.takes_chunks(fn)
    if listed:
        _try_all(fn, params, tokens, candidates.chunked(fn), tried, failures)
    if not any(trial.full for trial in tried):
        _try_all(fn, params, tokens, candidates.plain(fn), tried, failures)
    if not tried and {"batch", "dict"} & {*inputs(fn).required.values()}:  # its batch may hold one reward for each text
        _try_all(fn, params, tokens, candidates.with_columns_by_text(fn), tried, failures)
    by_text = [failure for failure in failures if failure[1].by_text]
    if not tried and by_text and (in_groups := _in_groups(fn, params, tokens, by_text)):
        return in_groups
    others: list[Trial] = []
    settled = any(
        trial.full or trial.plain_rows or (trial.fits and trial.style.by_text) or candidates.contract(fn, trial.style)
        for trial in tried
    )
    if not settled:
        _try_all(fn, params, tokens, candidates.reordered(fn), others, failures)
    if not tried and not any(trial.lit for trial in others):
        _try_all(fn, params, tokens, candidates.contained(fn), others, failures)
    if not any(trial.lit for trial in (*tried, *others)) and not listed:
        _try_all(fn, params, tokens, candidates.chunked(fn), others, failures)
    # a loss that runs in a usual layout, and skips these rows, is not called in an unusual one for what it shows by accident
    tried += [trial for trial in others if trial.full or not tried]
    if not any(trial.lit for trial in tried) and tokens.sequence is None:
        several = [dataclasses.replace(trial.style, several=True) for trial in tried if trial.style.laid_out]
        tried += [attempt(fn, params, tokens, style) for style in several]
    if not tried and (in_groups := _in_groups(fn, params, tokens, [f for f in failures if f[1].laid_out])):
        return in_groups
    if not tried:
        error = _of_another_size(fn, params, tokens, _likeliest(fn, failures))
        past.refuse(error, failures)
        raise error

    return max(tried, key=_speaks)  # the first of equals


def _in_groups(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, failures: list[tuple[InputError, Style]]
) -> Trial | None:
    """The best of the styles that fail on two texts on batches of more texts, for a loss of groups of texts.

    Numbers of texts that the errors name are tried last.
    """
    if tokens.sequence is None:
        return None
    named = [int(n) for error, _ in failures[:NAMED] for n in numbers_of(str(error.__cause__))]
    named = [n for n in dict.fromkeys(named) if 2 < n <= MOST_TEXTS and all(texts % n for texts in TEXTS)]
    for number in (*TEXTS, *(2 * n for n in named[:NAMED])):
        tried: list[Trial] = []
        _try_all(fn, params, texts_of(tokens, number), [[style for _, style in failures]], tried, [])
        if best := max((trial for trial in tried if trial.lit), key=_speaks, default=None):
            return best._replace(style=dataclasses.replace(best.style, group=_group(fn, params, tokens, best, number)))
    return None


def _group(fn: Callable, params: Mapping[str, Any], tokens: Tokens, trial: Trial, number: int) -> int:
    """The smallest divisor of a number of texts that a loss can be called on."""
    for group in (n for n in range(3, number) if number % n == 0):
        with contextlib.suppress(InputError):
            grad_of(fn, params, texts_of(tokens, group), trial.style)
            return group
    return number


def _speaks(trial: Trial) -> tuple:
    """What speaks for a style, the weightiest first."""
    usual = trial.full or trial.style.order == "texts"
    own = trial.style.fields != "column"
    return trial.lit > 0, not trial.mislaid, trial.reacts, not trial.flattened, own, usual, trial.lit, trial.graph


def _try_all(
    fn: Callable,
    params: Mapping[str, Any],
    tokens: Tokens,
    styles: Iterable[list[Style]],
    tried: list[Trial],
    failures: list[tuple[InputError, Style]],
) -> None:
    """Try styles until nothing speaks against one; what they show is added to ``tried``, what they raise to ``failures``."""
    for alike in styles:
        works: Style | None = None  # of styles that differ in types only, the first that raises nothing
        for style in alike:
            if works is not None and dataclasses.replace(style, fields=works.fields) != works:
                continue
            try:
                tried.append(_with_columns(fn, params, tokens, style))
            except InputError as error:  # a loss may be written with qlens' own checks
                failures.append((error, style))
                continue
            works = style
            if tried[-1].full:
                return
        if works is not None and candidates.contract(fn, works):
            return


def _likeliest(fn: Callable, failures: list[tuple[InputError, Style]]) -> InputError:
    """The error of the style in which a loss came furthest, and how it was called; qlens' own refusals before any.

    A loss that came to its end came furthest of all.
    """
    ended = (error for error, _ in failures if isinstance(error, EndedError))
    refused = next((error for error, _ in failures if not isinstance(error, LossError)), None) or next(ended, None)
    if refused is not None:
        return refused
    file = file_of(fn)

    def came(failure: tuple[InputError, Style]) -> tuple[tuple[int, ...], bool]:
        cause = failure[0].__cause__
        return depth(cause, file), not isinstance(cause, AttributeError | TypeError)  # of another type altogether

    error, style = max(failures, key=came)  # the first of equals
    told = _told(error, f"called with {described(style, seen_as(inputs(fn)), {})}", ", ")
    labels = next((name for name, role in inputs(fn).required.items() if role == "labels"), "")
    if labels and isinstance(error.__cause__, RuntimeError | NotImplementedError):
        more = f"{labels} holds token ids here: a parameter that takes a distribution, or logits, over the vocabulary"
        return _told(told, f"{more} is named teacher_probs or teacher_logits")
    if (setting := _unset(fn, error)) is not None:
        return _told(told, setting)
    return _told(
        told,
        f"if it wants them otherwise, write the call yourself, def loss(logits, labels): return {name_of(fn)}(...)",
    )


def _unset(fn: Callable, error: InputError) -> str | None:
    """What to write where a loss reads an attribute of a parameter that is None by default."""
    cause = error.__cause__
    if not isinstance(cause, AttributeError) or cause.obj is not None:
        return None
    wanted = inputs(fn)
    params = signature(fn).items()
    unset = [name for name, p in params if p.default is None and name not in (*wanted.required, *wanted.optional)]
    if not unset:
        return None
    named = " or ".join(unset)
    return f"{named} is None by default: give it a value, functools.partial({name_of(fn)}, {unset[0]}=...)"


def _of_another_size(fn: Callable, params: Mapping[str, Any], tokens: Tokens, error: InputError) -> InputError:
    """The error of a loss that cannot be called, with what is likely where it runs a model of its own."""
    with watched(fn) as seen, contextlib.suppress(InputError):
        call(fn, params, tokens, AS_GIVEN, style=next(candidates.plain(fn))[0])
    if not seen.started:
        return error
    return _told(
        error,
        f"it runs another model ({seen.started[0]}), and is tried with a vocabulary of {tokens.logits.shape[1]}: if "
        "that model has another, give tokens with logits as wide as its own, explain(loss, tokens)",
    )


def _told(error: InputError, more: str, joint: str = "; ") -> LossError:
    """The same error, of the same cause, that says more."""
    told = LossError(f"{error}{joint}{more}")
    told.__cause__ = error.__cause__
    return told


def _with_columns(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Trial:
    """One style, with the further columns of a model's inputs that the loss asks for.

    Raises:
        InputError: it asks for a column that no field of the tokens is.
    """
    reads_columns = style.container == "dict" or {"batch", "dict"} & {*inputs(fn).required.values()}
    while True:
        try:
            return attempt_at_widths(fn, params, tokens, style)
        except LossError as error:
            cause = error.__cause__
            name = str(cause.args[0]) if isinstance(cause, KeyError) and cause.args else ""
            if not reads_columns or not name or name in style.columns:
                raise
            if style.container == "dict" and role_of(name) not in COLUMNS:  # tried only where all else fails
                raise
            if role_of(name) not in COLUMNS:
                raise InputError(
                    f"{name_of(fn)} reads inputs[{name!r}], which qlens cannot fill: it gives input_ids, attention_mask, "
                    f"labels, and teacher_logits, weight, advantage, mask and the like; read it with "
                    f"inputs.get({name!r}) and a default of your own"
                ) from error
            style = dataclasses.replace(style, columns=(*style.columns, name))


def _labels_in_ids(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Style:
    """The style with input_ids that are the labels, for a loss that reads no labels of its own but reacts to the ids."""
    base = grad_of(fn, params, tokens, style)
    other = grad_of(fn, params, changed(tokens, torch.ones(len(tokens), dtype=torch.bool)), style)
    if not torch.allclose(base, other):
        return style
    taken = dataclasses.replace(style, ids=True)
    with watched() as seen:
        try:
            trial = attempt(fn, params, tokens, taken)
            base = grad_of(fn, params, tokens, taken)
            other = grad_of(fn, params, changed(tokens, torch.ones(len(tokens), dtype=torch.bool)), taken)
        except LossError:
            return style
    reacts = not torch.allclose(base, other) and trial.lit > 0
    return taken if reacts and not seen.models else style
