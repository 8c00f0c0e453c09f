"""One call of a loss: its arguments filled by their names, on rows or on a batch in the loss's own layout."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlens.core.autograd import ordinary
from qlens.core.tokens import Tokens
from qlens.losses.arguments import Columns, arguments
from qlens.losses.layout.layouts import Layout, Style, tiled
from qlens.losses.layout.names import FIELD
from qlens.losses.layout.signature import CALLERS, inputs, name_of, signature
from qlens.losses.layout.views import View, batch_of, batch_view, rows_view, supervised, token_ids
from qlens.losses.stubs.holders import built, entry_of, is_trainer, with_model
from qlens.losses.user_code import file_of, user_errors

__all__ = ["CALLERS", "Columns", "Layout", "call", "extra_inputs", "kind", "name_of", "on_batch", "opened", "signature",
           "written"]  # fmt: skip


def opened(loss: Callable) -> Callable:
    """The function to call: compute_loss of a Trainer's class built around a stub model, the instance of a loss class, or
    the loss itself.

    Raises:
        InputError: the class cannot be built without arguments, or the function is asynchronous or a generator.
    """
    if inspect.isclass(loss) and is_trainer(loss):
        from qlens.losses.stubs.trainers import trainer_loss

        return trainer_loss(loss)
    return with_model(entry_of(built(loss) if inspect.isclass(loss) else loss))


def kind(fn: Callable) -> str:
    """What a loss is called with: "tokens", "logits", "outputs", "hidden" or "model".

    Raises:
        InputError: no parameter can take logits.
    """
    return inputs(fn).kind


def extra_inputs(fn: Callable) -> tuple[str, ...]:
    """The fields of Tokens that a loss requires beside logits and labels."""
    fields = [FIELD[role] for role in inputs(fn).required.values() if role in FIELD and FIELD[role] != "weight"]
    if "pair" in fields:
        fields.append("chosen")
    return tuple(dict.fromkeys(fields))


def takes(fn: Callable, role: str) -> bool:
    """Whether a loss takes this input, with or without a default."""
    loss_inputs = inputs(fn)
    return role in loss_inputs.required.values() or role in loss_inputs.optional.values()


def call(
    fn: Callable,
    params: Mapping[str, Any],
    tokens: Tokens,
    layout: Layout,
    safe: bool = False,
    style: Style | None = None,
) -> Any:
    """One call of a loss on the rows in a layout.

    Args:
        fn: the loss.
        params: its parameters.
        tokens: the supervised rows.
        layout: copies and further positions.
        safe: whether the loss may be passed the tokens' own tensors; by default copies.
        style: how it is called; by default as found by ``style_of``.
    """
    if style is None:
        from qlens.losses.layout.layout_search import style_of

        style = style_of(fn, params, tokens)
    rows = tiled(tokens, layout)
    if kind(fn) == "tokens":
        return on_view(fn, params, rows_view(protected(fn, rows), layout, style, safe=True))
    view = batch_view(rows, layout, style) if style.laid_out else rows_view(rows, layout, style, safe)
    return on_view(fn, params, view)


def protected(fn: Callable, tokens: Tokens) -> Tokens:
    """The tokens for a method of tokens: copies for a user's own, which may write on them, else the tokens themselves."""
    return tokens if is_built_in(fn) else tokens.copied()


def is_built_in(fn: Callable) -> bool:
    """Whether it is one of qlens' own methods."""
    return str(getattr(fn, "__module__", "")).startswith("qlens.variants.")


def on_batch(
    fn: Callable,
    logits: Tensor,
    labels: Tensor,
    tokens: Tokens,
    params: Mapping[str, Any],
    style: Style,
    attention: Tensor | None = None,
    ids: Tensor | None = None,
    **values: Any,
) -> Any:
    """One call on a batch.

    Args:
        fn: the loss.
        logits: (B, T, V).
        labels: unshifted, (B, T).
        tokens: the supervised positions, in order.
        params: parameters of the loss.
        style: how it is called.
        attention: attention mask (B, T); by default ones.
        ids: token ids (B, T); by default arbitrary ones.
        **values: arguments by name.
    """
    if attention is None:
        attention = torch.ones_like(labels)
    if ids is None:
        ids = token_ids(torch.arange(labels.numel(), device=labels.device).view(labels.shape), logits.shape[-1])
    view = batch_of(logits, labels, tokens, supervised(labels), attention, ids, style)
    return on_view(fn, params, view, **values)


def on_view(fn: Callable, params: Mapping[str, Any], view: View, **values: Any) -> Any:
    """One call with every argument filled from a view; ``values`` and ``params`` override them by name.

    Raises:
        LossError: the loss raised an exception.
        InputError: the tokens lack a field that it requires.
    """
    filled = arguments(fn, view) | values
    filled |= {name: value for name, value in params.items() if value is not None or name not in filled}
    parameters = signature(fn)
    positional = inspect.Parameter.POSITIONAL_ONLY
    args = [filled.pop(name) for name in parameters if name in filled and parameters[name].kind is positional]
    with user_errors(name_of(fn), file_of(fn)):
        return fn(*args, **filled)


def written(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style | None = None) -> tuple[str, ...]:
    """Which of logits and labels a loss changes in place, seen on copies."""
    if kind(fn) != "logits":
        return ()
    if style is None:
        from qlens.losses.layout.layout_search import style_of

        style = style_of(fn, params, tokens)
    with torch.inference_mode(False), torch.no_grad():  # tensors made under inference_mode have no version counter
        tokens = ordinary(tokens)
        make_view = batch_view if style.laid_out else rows_view
        view = make_view(tokens.with_logits(tokens.logits.detach()), Layout(), style)
        tensors = {"logits": view.logits, "labels": view.labels}
        versions = {name: tensor._version for name, tensor in tensors.items()}
        on_view(fn, params, view)
    return tuple(name for name, tensor in tensors.items() if tensor._version != versions[name])
