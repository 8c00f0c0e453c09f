"""Past searches for a loss's layout at other vocabularies or with other fields, so that a new one need not try all."""

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.losses.layout import candidates
from qlens.losses.layout.layouts import Style
from qlens.losses.layout.search_errors import Failure, extended
from qlens.losses.layout.signature import Memo
from qlens.losses.layout.trial import Trial, attempt, attempt_at_widths, sample
from qlens.losses.user_code import first_line

_PAST = Memo()


class PastSearches:
    """The results of earlier searches for one loss with the same parameters.

    Attributes:
        trials: the trials of the styles that were chosen.
        error: the error of the last search that found no style, or None.
        failures: of that search, the first style of every layout and error message, its numbers left out.
    """

    def __init__(self):
        self.trials: list[Trial] = []
        self.error: InputError | None = None
        self.failures: dict[tuple, Style] = {}

    @classmethod
    def of(cls, fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> "PastSearches":
        """Those of a loss on tokens that do, or do not, have sequences."""
        return _PAST.get(fn, (repr(sorted(params.items(), key=str)), tokens.sequence is not None), cls)

    def add(self, trial: Trial) -> None:
        """Record a style that was chosen."""
        self.trials += [trial] if trial.coverage > 0 else []

    def fail(self, error: InputError, failures: list[Failure]) -> None:
        """Record a search that found no style."""
        self.error, self.failures = error, {}
        for failure, style in failures:
            self.failures.setdefault((_layout_of(style), _message(failure)), style)

    def matching_trial(self, fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Trial | None:
        """A trial of a style that was chosen before, if it fits these tokens too.

        Raises:
            InputError: no style was found before, and every recorded style raises the same error again.
        """
        usual = next(candidates.plain(fn))[0]
        if any(_layout_of(before.style) != _layout_of(usual) for before in self.trials):
            with contextlib.suppress(InputError):  # a small vocabulary may allow another layout alone
                if attempt(fn, params, sample(fn, tokens), usual).full:
                    return None
        for before in self.trials:
            with contextlib.suppress(InputError):
                trial = attempt_at_widths(fn, params, sample(fn, tokens, before.style.group), before.style)
                steady = trial.reacts == 1 and not trial.flattened and trial.misplaced == before.misplaced
                if trial.full or (trial.coverage > 0 and steady):
                    return trial
        if self.error is None:
            return None
        for (_, message), style in self.failures.items():
            try:
                attempt(fn, params, sample(fn, tokens), style)
            except InputError as error:
                if _message(error) == message:
                    continue
            return None
        raise extended(self.error, "")


def _layout_of(style: Style) -> tuple:
    return style.shape, style.boxed, style.order, style.container, style.chunks > 0, style.pairs, style.same_form


def _message(error: InputError) -> str:
    """The message of what a loss raised, without its numbers, which change with the vocabulary."""
    cause = error.__cause__
    return re.sub(r"\d+", "", str(error) if cause is None else f"{type(cause).__name__}: {first_line(cause)}")
