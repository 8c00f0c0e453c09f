"""Candidate styles of a loss, by its parameters, the likeliest first."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator

import torch

from qlens.losses.layout.layouts import Style
from qlens.losses.layout.names import ROLE
from qlens.losses.layout.signature import inputs, lists_of, signature

PER_TOKEN = ("weight", "advantage", "critical", "hint", "mask", "sequence", "old log probs", "reference log probs",
             "teacher log probs", "log probs", "teacher")  # fmt: skip
CHUNKS = (8, 4, 2, 3, 16)  # numbers of chunks tried beside the numbers in the loss itself
MOST_CHUNKS = 64


def contract(fn: Callable, style: Style) -> bool:
    """Whether a Trainer defines how the loss is called, so that a loss that forgets to shift is not called otherwise."""
    roles = {*inputs(fn).required.values()}
    return "model" in roles or ("outputs" in roles and style.boxed)


def plain(fn: Callable) -> Iterator[list[Style]]:
    """Styles with logits (N, V) or (B, T, V), the likeliest first, in lists of which the first that raises nothing counts."""
    loss_inputs = inputs(fn)
    roles = set(loss_inputs.required.values()) | set(loss_inputs.optional.values())
    first = next(iter(loss_inputs.required.items()))
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
    other_models = any(role.endswith(" outputs") and role != "return outputs" for role in roles)
    for shape in shapes:
        yield from _filled(fn, shape)
        if other_models:  # of other models: as outputs, where the student's are none, and the other way round
            yield from _filled(fn, dataclasses.replace(shape, same_form=not shape.same_form))


def with_columns_by_text(fn: Callable) -> Iterator[list[Style]]:
    """The usual styles with one advantage and one weight for each text, for columns of a batch that the loss reads."""
    for similar in plain(fn):
        laid_out = [dataclasses.replace(style, fields="texts") for style in similar if style.laid_out]
        yield list(dict.fromkeys(laid_out))


def reordered(fn: Callable) -> Iterator[list[Style]]:
    """Styles with logits (B, V, T), or (T, B, V), sequence first, and labels (T, B) or (B, T)."""
    roles = {*inputs(fn).required.values()}
    if {"model", "tokens", "head"} & roles or not {"logits", "outputs", "dict"} & roles:
        return
    for order in ("classes", "positions", "mixed"):
        for shape in ("aligned", "batch"):
            yield from _filled(fn, Style(shape, order=order))


def chunked(fn: Callable) -> Iterator[list[Style]]:
    """Styles with logits as a list of chunks along the tokens."""
    if {"model", "tokens"} & {*inputs(fn).required.values()}:
        return
    for shape in ("aligned", "batch", "rows"):
        for number in _chunk_numbers(fn):
            for cut in ("chunk", "tensor_split"):
                yield from _filled(fn, Style(shape, chunks=number, cut=cut))


def contained(fn: Callable) -> Iterator[list[Style]]:
    """Styles with labels as one-hot distributions, in a tuple beside a mask, or in a dict; outputs or inputs in a tuple."""
    roles = {*inputs(fn).required.values()}
    if {"tokens", "head"} & roles:
        return
    shapes = [Style(), Style("batch"), Style("aligned"), Style("batch", boxed=True)]
    if "outputs" in roles:
        yield from _filled(fn, Style("batch", container="outputs"))
    if "model" in roles:
        yield from _filled(fn, Style("batch", container="pair"))
    elif "labels" in roles:
        for container in ("one-hot", "pair", "dict"):
            for shape in shapes:
                yield from _filled(fn, dataclasses.replace(shape, container=container))


def takes_chunks(fn: Callable) -> bool:
    """Whether logits are annotated as a list of tensors."""
    roles = inputs(fn).required | inputs(fn).optional
    return any(roles.get(name) in ("logits", "outputs") for name in lists_of(fn))


def _chunk_numbers(fn: Callable) -> list[int]:
    """Numbers of chunks: attributes and parameters named so, other small numbers of the loss, usual ones."""
    owner = getattr(fn, "__self__", fn)
    by_name = {**getattr(owner, "__dict__", {}), **{name: p.default for name, p in signature(fn).items()}}
    first = [value for name, value in by_name.items() if "chunk" in name]
    run = inspect.unwrap(getattr(owner, "forward", fn))
    code_constants = getattr(getattr(run, "__code__", None), "co_consts", ())
    numbers = [*first, *by_name.values(), *code_constants, *CHUNKS]
    whole = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and 1 < n <= MOST_CHUNKS]
    return list(dict.fromkeys(whole))[: 2 * len(CHUNKS)]


def _filled(fn: Callable, shape: Style) -> Iterator[list[Style]]:
    """The variations of a shape: masks, positions of per-token values, optional inputs."""
    loss_inputs = inputs(fn)
    roles = set(loss_inputs.required.values()) | set(loss_inputs.optional.values())
    masked = "mask" in roles
    texts = any(ROLE.get(name) == "input ids" for name, role in loss_inputs.required.items() if role == "labels")
    attended = "attention mask" in roles
    flags = [torch.float32, torch.bool, torch.long] if masked or attended else [torch.float32]
    optional_roles = set(loss_inputs.optional.values())
    optional = [True, False] if optional_roles - {"count"} else [True]
    counted = [False, True] if "count" in optional_roles else [False]
    places = ["labels"]
    if shape.laid_out and roles & set(PER_TOKEN):
        places = ["labels", "logits", "shifted"] if shape.shape == "batch" else ["logits"]
        places += ["rows"] if "log probs" not in roles or "labels" in roles else []  # log-probs would be rows as well
        places += ["texts", "column"] if {"advantage", "weight"} & roles and shape.order == "texts" else []
    cleans = [False, True] if attended or texts else [False]
    if masked:
        cleans = [False, True] if shape.shape == "batch" else [True, False]
    for inverted in (False, True) if masked else (False,):
        yield [
            dataclasses.replace(
                shape, optional=passed, fields=place, clean=clean, flag=flag, inverted=inverted, counted=count
            )
            for passed in optional
            for count in counted
            for clean in cleans
            for flag in flags
            for place in places
        ]
