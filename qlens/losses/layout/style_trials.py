"""The best style of a loss on some tokens, by trials of all styles that its parameters allow, the likeliest first."""

import contextlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.losses.layout import candidates
from qlens.losses.layout.layouts import Style
from qlens.losses.layout.names import FIELD, role_of
from qlens.losses.layout.pairing import paired, pairing
from qlens.losses.layout.past_searches import PastSearches
from qlens.losses.layout.search_errors import Failure, likeliest, with_hint_on_models
from qlens.losses.layout.signature import inputs, name_of
from qlens.losses.layout.trial import Trial, attempt, attempt_at_widths, grad_of, texts_of
from qlens.losses.user_code import EndedError, LossError, numbers_of

COLUMNS = {*FIELD, "mask", "position ids", "labels", "logits", "outputs"} - {"chosen log probs", "rejected log probs"}
TEXTS = (8, 48, 20)  # texts of a batch, tried if a loss fails on two: 2, 3, 4, 5, 6, 8, 10, 12, 16 are divisors
MOST_TEXTS, NAMED = 64, 3  # size of a group that an error message names; messages that are read, and sizes tried


class StyleTrials:
    """The trials of the styles of one loss on some tokens.

    Attributes:
        trials: of the styles in which it could be called.
        failures: the errors of all others.
    """

    def __init__(self, fn: Callable, params: Mapping[str, Any], tokens: Tokens):
        self.fn, self.params, self.tokens = fn, params, tokens
        self.trials: list[Trial] = []
        self.failures: list[Failure] = []

    @property
    def coverage(self) -> bool:
        """Whether any trial showed a gradient."""
        return any(trial.coverage for trial in self.trials)

    def best(self) -> Trial | None:
        """The best trial, the first of equals; None without any."""
        return max(self.trials, key=_rank, default=None)

    def run(self, styles: Iterable[list[Style]]) -> "StyleTrials":
        """Try lists of similar styles until one trial is full."""
        for similar in styles:
            works: Style | None = None  # of styles that differ in dtypes only, the first that raises nothing
            for style in similar:
                if works is not None and replace(style, fields=works.fields) != works:
                    continue
                try:
                    self.trials.append(_with_columns(self.fn, self.params, self.tokens, style))
                except InputError as error:
                    for raised in filter(None, (error, error.__cause__)):  # its frames hold the tensors of the call
                        traceback.clear_frames(raised.__traceback__)
                    self.failures.append((error, style))
                    continue
                works = style
                if self.trials[-1].full:
                    return self
            if works is not None and candidates.contract(self.fn, works):
                return self
        return self

    def in_groups(self, failures: list[Failure]) -> Trial | None:
        """The best trial, on batches of more texts, of styles that failed on two: for a loss of groups of texts.

        Numbers of texts that the errors name are tried last. Errors after the call, of the backward pass, concern no groups.
        """
        failures = [failure for failure in failures if not isinstance(failure[0], EndedError)]
        if self.tokens.sequence is None or not failures:
            return None
        numbers = [int(n) for error, _ in failures[:NAMED] for n in numbers_of(str(error.__cause__))]
        numbers = [n for n in dict.fromkeys(numbers) if 2 < n <= MOST_TEXTS and all(texts % n for texts in TEXTS)]
        for number in (*TEXTS, *(2 * n for n in numbers[:NAMED])):
            many = StyleTrials(self.fn, self.params, texts_of(self.tokens, number))
            best = many.run([[style for _, style in failures]]).best()
            if best is not None and best.coverage:
                return best._replace(style=replace(best.style, group=self._group(best.style, number)))
        return None

    def _group(self, style: Style, number: int) -> int:
        """The smallest divisor of a number of texts that the loss can be called on."""
        for group in (n for n in range(3, number) if number % n == 0):
            with contextlib.suppress(InputError):
                grad_of(self.fn, self.params, texts_of(self.tokens, group), style)
                return group
        return number


def best_trial(fn: Callable, params: Mapping[str, Any], tokens: Tokens, past: PastSearches) -> Trial:
    """The best trial of all styles that a loss allows; for a loss of pairs, of styles that hold pairs in its order.

    Raises:
        InputError: it can be called in no style.
    """
    if tokens.pair is not None and tokens.chosen is not None and (order := pairing(fn, params)):
        pairs = StyleTrials(fn, params, tokens).run(paired(fn, order))
        if pairs.coverage and (best := pairs.best()) is not None:
            return best
    usual = StyleTrials(fn, params, tokens)
    listed = candidates.takes_chunks(fn)
    if listed:
        usual.run(candidates.chunked(fn))
    if not any(trial.full for trial in usual.trials):
        usual.run(candidates.plain(fn))
    if not usual.trials and {"batch", "dict"} & {*inputs(fn).required.values()}:  # it may hold one reward for each text
        usual.run(candidates.with_columns_by_text(fn))
    if not usual.trials and (trial := usual.in_groups([each for each in usual.failures if each[1].by_text])):
        return trial
    unusual = StyleTrials(fn, params, tokens)
    if not any(_settles(fn, trial) for trial in usual.trials):
        unusual.run(candidates.reordered(fn))
    if not usual.trials and not unusual.coverage:
        unusual.run(candidates.contained(fn))
    if not (usual.coverage or unusual.coverage or listed):
        unusual.run(candidates.chunked(fn))
    failures = usual.failures + unusual.failures
    # an unusual layout of a loss that runs in a usual one, and skips these rows, may only seem to fit
    usual.trials += [trial for trial in unusual.trials if trial.full or not usual.trials]
    if not usual.coverage and tokens.sequence is None:
        several = [replace(trial.style, several=True) for trial in usual.trials if trial.style.laid_out]
        usual.trials += [attempt(fn, params, tokens, style) for style in several]
    if (best := usual.best()) is not None:
        return best
    if (trial := usual.in_groups([each for each in failures if each[1].laid_out])) is not None:
        return trial
    error = with_hint_on_models(fn, params, tokens, likeliest(fn, failures))
    past.fail(error, failures)
    raise error


def _settles(fn: Callable, trial: Trial) -> bool:
    """Whether a trial of a usual style makes trials of unusual ones needless."""
    by_text = trial.fits and trial.style.by_text
    return trial.full or trial.plain_rows or by_text or candidates.contract(fn, trial.style)


def _rank(trial: Trial) -> tuple:
    """The order of trials, by the most important property first."""
    usual = trial.full or trial.style.order == "texts"
    not_column = trial.style.fields != "column"
    return (
        trial.coverage > 0,
        not trial.misplaced,
        trial.reacts,
        not trial.flattened,
        not_column,
        usual,
        trial.coverage,
        trial.graph,
    )


def _with_columns(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Trial:
    """A trial of one style, with the further columns of a model's inputs that the loss reads.

    Raises:
        InputError: it reads a column that no field of the tokens can fill.
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
            if style.container == "dict" and role_of(name) not in COLUMNS:  # the last layouts that are tried
                raise
            if role_of(name) not in COLUMNS:
                raise InputError(
                    f"{name_of(fn)} reads inputs[{name!r}], which qlens cannot fill: it gives input_ids, attention_mask, "
                    f"labels, and teacher_logits, weight, advantage, mask and the like; read it with "
                    f"inputs.get({name!r}) and a default of your own"
                ) from error
            style = replace(style, columns=(*style.columns, name))
