"""The error of a loss that can be called in no layout: that of the layout in which it came furthest, with a hint."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.losses.calling import call
from qlens.losses.layout import candidates
from qlens.losses.layout.layouts import Style
from qlens.losses.layout.signature import inputs, name_of, signature, student_input
from qlens.losses.layout.trial import AS_GIVEN
from qlens.losses.layout.wording import described
from qlens.losses.side_effects import recorded_modules
from qlens.losses.user_code import EndedError, LossError, depth, file_of

Failure = tuple[InputError, Style]


def likeliest(fn: Callable, failures: list[Failure]) -> InputError:
    """The error of the style in which a loss came furthest, with how it was called.

    qlens' own refusals come first, then errors of calls that returned a value.
    """
    after_return = (error for error, _ in failures if isinstance(error, EndedError))
    refused = next((error for error, _ in failures if not isinstance(error, LossError)), None) or next(
        after_return, None
    )
    if refused is not None:
        return refused
    file = file_of(fn)

    def progress(failure: Failure) -> tuple[tuple[int, ...], bool]:
        cause = failure[0].__cause__
        return depth(cause, file), not isinstance(cause, AttributeError | TypeError)  # an input of another type

    error, style = max(failures, key=progress)  # the first of equals
    error = extended(error, f"called with {described(style, student_input(inputs(fn)), {})}", ", ")
    labels = next((name for name, role in inputs(fn).required.items() if role == "labels"), "")
    if labels and isinstance(error.__cause__, RuntimeError | NotImplementedError):
        hint = f"{labels} holds token ids here: a parameter that takes a distribution, or logits, over the vocabulary"
        return extended(error, f"{hint} is named teacher_probs or teacher_logits")
    if (setting := _unset(fn, error)) is not None:
        return extended(error, setting)
    return extended(
        error,
        f"if it wants them otherwise, write the call yourself, def loss(logits, labels): return {name_of(fn)}(...)",
    )


def _unset(fn: Callable, error: InputError) -> str | None:
    """A hint for a loss that reads an attribute of a parameter whose default is None."""
    cause = error.__cause__
    if not isinstance(cause, AttributeError) or cause.obj is not None:
        return None
    loss_inputs = inputs(fn)
    params = signature(fn).items()
    unset = [
        name for name, p in params if p.default is None and name not in (*loss_inputs.required, *loss_inputs.optional)
    ]
    if not unset:
        return None
    return f"{' or '.join(unset)} is None by default: give it a value, functools.partial({name_of(fn)}, {unset[0]}=...)"


def with_hint_on_models(fn: Callable, params: Mapping[str, Any], tokens: Tokens, error: InputError) -> InputError:
    """The error, with a hint on the vocabulary if the loss runs a model of its own."""
    with recorded_modules(fn) as module_calls, contextlib.suppress(InputError):
        call(fn, params, tokens, AS_GIVEN, style=next(candidates.plain(fn))[0])
    if not module_calls.started:
        return error
    return extended(
        error,
        f"it runs another model ({module_calls.started[0]}), and is tried with a vocabulary of {tokens.logits.shape[1]}: "
        "if that model has another, give tokens with logits as wide as its own, explain(loss, tokens)",
    )


def extended(error: InputError, text: str, joint: str = "; ") -> LossError:
    """A copy of an error with the same cause and more text."""
    copy = LossError(f"{error}{joint}{text}" if text else str(error))
    copy.__cause__ = error.__cause__
    return copy
