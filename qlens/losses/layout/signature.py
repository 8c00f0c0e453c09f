"""The signature of a loss: its parameters, and by their names the input that each one takes."""

import functools
import inspect
import re
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from qlens.core.errors import InputError
from qlens.losses.layout.names import FIELD, KERNEL, ROLE, STUDENT, role_by_words, role_of

CALLERS = ("num_items_in_batch", "return_outputs")  # filled in by a Trainer, no parameters of the loss


class Memo:
    """Values by callable, kept as long as the callable lives, through weak references."""

    def __init__(self):
        self._values: dict[tuple, tuple[weakref.ref, Any]] = {}

    def get(
        self, fn: Callable, name: Any, make: Callable[[], Any], lasting: Callable[[Any], bool] = lambda value: True
    ) -> Any:
        """The value under ``name``, made at the first call, and kept if ``lasting`` is true of it."""
        owner, part = _owner(fn)
        key = (id(owner), part, name)
        if key not in self._values:
            value = make()
            if not lasting(value):
                return value
            try:
                self._values[key] = (weakref.ref(owner, lambda _: self._values.pop(key, None)), value)
            except TypeError:  # a callable that takes no weak reference: nothing is remembered
                return value
        return self._values[key][1]


_SIGNATURES = Memo()


def signature(fn: Callable) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable by name; of a module, those of its forward."""
    return _SIGNATURES.get(fn, "signature", lambda: _signature(fn))


def _signature(fn: Callable) -> dict[str, inspect.Parameter]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        parameters = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn).parameters
    except (ValueError, TypeError) as error:
        raise InputError(f"{name_of(fn)}: its parameters cannot be read ({error}): wrap it in a function") from error
    named_parameters = {name: p for name, p in parameters.items() if p.kind not in variadic}
    if not named_parameters and parameters:  # f(*args): logits and labels, in this order
        keywords_only = all(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
        )  # f(**kwargs): by these names
        kind = inspect.Parameter.KEYWORD_ONLY if keywords_only else inspect.Parameter.POSITIONAL_ONLY
        return {name: inspect.Parameter(name, kind) for name in ("logits", "labels")}
    return named_parameters


class Inputs(NamedTuple):
    """The inputs of a loss, by parameter: required ones, optional ones, and parameters without a known input.

    Args:
        kind: what the student is: "tokens", "logits", "outputs", "model" or "hidden".
        required: roles of the parameters that must be passed.
        optional: roles of the parameters whose default is None.
        missing: parameters without a default and without a known input.
    """

    kind: str
    required: dict[str, str]
    optional: dict[str, str]
    missing: tuple[str, ...]


def inputs(fn: Callable) -> Inputs:
    """The inputs that the parameters take, by their names, or by their places if a name is unknown.

    Raises:
        InputError: no parameter can take logits.
    """
    return _SIGNATURES.get(fn, "inputs", lambda: _inputs(fn))


def roles_taken(fn: Callable, columns: Collection[str] = ()) -> set[str]:
    """The inputs that a loss takes, as parameters or as columns of its batch."""
    loss_inputs = inputs(fn)
    roles = (*loss_inputs.required.values(), *loss_inputs.optional.values(), *map(role_of, columns))
    return {role for role in roles if role is not None}


def lists_of(fn: Callable) -> tuple[str, ...]:
    """The parameters annotated as lists of tensors."""
    return _SIGNATURES.get(fn, "lists", lambda: tuple(n for n, p in signature(fn).items() if _is_list(p.annotation)))


def _is_list(annotation: Any) -> bool:
    """Whether an annotation, or its text, is a list, tuple or sequence of tensors."""
    text = annotation if isinstance(annotation, str) else str(annotation)
    return bool(re.match(r"(?:[\w.]*\.)?(?:list|tuple|sequence|iterable)\[.*tensor", text, re.IGNORECASE))


def _inputs(fn: Callable) -> Inputs:
    params = signature(fn)
    bare = [name for name, p in params.items() if p.default is p.empty]
    kernel = {name: role for name in bare if (role := _kernel_role(name))}
    if {"logits", "head"} <= set(kernel.values()):
        return Inputs("hidden", kernel, {}, tuple(name for name in bare if name not in kernel))
    roles = {name: ROLE[name.lower().lstrip("_")] for name in params if name.lower().lstrip("_") in ROLE}
    for name in bare:
        role = None if name in roles else role_by_words(name, params)
        if role and not (role in STUDENT and any(other in STUDENT for other in roles.values())):
            roles[name] = role
    if "reduction" in params:  # as in torch's own losses: a weight for each class, no weights of tokens
        roles = {name: role for name, role in roles.items() if role != "weight" or params[name].default is not None}
    _assign_sampling_role(roles)
    _by_place(params, bare, roles)
    if "labels" not in roles.values():  # f(logits, input_ids): a text is its own labels
        roles |= {name: "labels" for name, role in roles.items() if role == "input ids"}
    students = [roles[name] for name in params if roles.get(name) in STUDENT]
    if not students:
        raise InputError(
            f"{name_of(fn)} takes no argument that logits can be given to: a loss takes tokens, logits and labels, outputs "
            "and labels, model and inputs, or hidden, head and labels"
        )
    kind = {"tokens": "tokens", "outputs": "outputs", "model": "model"}.get(students[0], "logits")
    if kind == "model":  # beside a model, a teacher is one too
        roles = {name: f"{role} model" if role in ("teacher", "reference") else role for name, role in roles.items()}
    if kind == "tokens":
        roles = {name: "tokens" if roles.get(name) == "tokens" else FIELD.get(roles.get(name, "")) for name in bare}
        roles = {name: role for name, role in roles.items() if role}
    essential = (*STUDENT, "labels", "batch")  # a default of None is no way to call a loss without these
    required = {name: roles[name] for name in bare if name in roles}
    for name, role in roles.items():
        if role in essential and params[name].default is None and role not in required.values():
            required[name] = role
    optional = {}
    for name, p in params.items():
        if name in roles and name not in required and p.default is None and roles[name] not in _LEFT:
            optional[name] = roles[name]
    if "labels" in required.values():  # a second name for labels is another way to give the same
        optional = {name: role for name, role in optional.items() if role != "labels"}
    return Inputs(kind, required, optional, tuple(name for name in bare if name not in roles))


_LEFT = (
    "vocabulary", "ignore", "temperature", "return outputs", "logits", "outputs", "model", "batch", "tokens",
    "position ids", "input ids", "texts", "dict",
)  # fmt: skip
"""Inputs that keep their default if they have one."""


def _assign_sampling_role(roles: dict[str, str]) -> None:
    """Give the role of a sampling policy to one of two inputs of an old policy: the one that ratios are not taken to.

    Ratios are taken to the one named proximal, or else to the one that is not named after the sampler.
    """
    for role in ("old", "old log probs"):
        names = [name for name in roles if roles[name] == role]
        if len(names) == 2:
            near = [name for name in names if re.search("prox", name.lower())]
            near = near or [name for name in names if not re.search("rollout|sampl|behav|infer", name.lower())]
            roles[next(name for name in reversed(names) if name != (near or names)[0])] = f"sampling {role}"


def _by_place(params: Mapping[str, inspect.Parameter], bare: list[str], roles: dict[str, str]) -> None:
    """Assign roles by place: first the student's input, then labels or the inputs of a model."""
    places = [name for name in bare if params[name].kind is not inspect.Parameter.KEYWORD_ONLY] or bare
    unknown = [name for name in places if name not in roles]
    if not any(roles.get(name) in STUDENT for name in params):
        second = roles.get(places[1]) if len(places) > 1 else None
        first = unknown[0] if unknown else None
        if (
            first is None and len(places) == 1 and roles[places[0]] == "batch"
        ):  # f(batch), which holds logits and labels
            roles[places[0]] = "dict"
            return
        if first is None and places and roles[places[0]] in ("batch", "labels"):  # f(inputs, targets), f(x, y)
            first = places[0] if len(places) > 1 else None
        if first is None:
            return
        roles[first] = "model" if second == "batch" and first == places[0] else "logits"
        unknown = [name for name in unknown if name != first]
    student = next(name for name in params if roles.get(name) in STUDENT)
    if roles[student] == "model":
        if not {"batch", "input ids"} & set(roles.values()) and unknown:
            roles[unknown[0]] = "input ids" if "labels" in roles.values() else "batch"  # f(model, x, y)
    elif roles[student] in ("logits", "outputs", "log probs", "probs") and "labels" not in roles.values():
        if unknown and places.index(unknown[0]) == 1:
            roles[unknown[0]] = "labels"


def _kernel_role(name: str) -> str | None:
    return next((role for role, names in KERNEL.items() if name in names), None)


def settings_of(fn: Any) -> tuple:
    """The strings and flags, such as "mean" or True, that a callable refers to and that may change its result.

    They are taken from a function's closure, defaults and global names, or from an object's attributes; lists and dicts are
    searched one level deep.
    """
    values: list[Any] = []
    if isinstance(fn, functools.partial):
        values += [*fn.args, fn.keywords, *settings_of(fn.func)]
    owner = fn.__self__ if inspect.ismethod(fn) else fn
    if not inspect.isfunction(owner):
        values.append(dict(getattr(owner, "__dict__", {})))
    code = inspect.unwrap(fn.__func__ if inspect.ismethod(fn) else fn)
    if inspect.isfunction(code):
        values += [*(code.__defaults__ or ()), code.__kwdefaults__ or {}]
        values += [code.__globals__[name] for name in code.__code__.co_names if name in code.__globals__]
        for cell in code.__closure__ or ():
            try:
                values.append(cell.cell_contents)
            except ValueError:  # an empty cell
                continue
    settings: list[Any] = []
    for value in values:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        settings += [each for each in list(inner) if isinstance(each, str | bool) or each is None]
    return tuple(settings)


def student_input(loss_inputs: Inputs) -> str:
    """The form of the student's input: its kind, or "sums", "dict" or "log probs"."""
    roles = set(loss_inputs.required.values())
    if any(role.endswith("chosen log probs") for role in roles):
        return "sums"
    if "dict" in roles:
        return "dict"
    return "log probs" if "log probs" in roles and "labels" not in roles else loss_inputs.kind


def name_of(fn: Any) -> str:
    """The name of a callable in messages."""
    if isinstance(fn, functools.partial):
        return name_of(fn.func)
    return fn.__name__ if inspect.isroutine(fn) or inspect.isclass(fn) else type(fn).__name__


def _owner(fn: Callable) -> tuple[Any, str]:
    """The object that a callable belongs to, and the part of it that is called."""
    if inspect.ismethod(fn):
        return fn.__self__, fn.__func__.__name__
    return fn, "forward" if isinstance(fn, nn.Module) else ""
