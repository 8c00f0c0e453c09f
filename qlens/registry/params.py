"""Parameters of methods: their types and ranges from a function's annotations, and spec strings."""

import ast
import copy
import functools
import hashlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from qlens.core.errors import InputError, ParameterError, brief
from qlens.losses import calling
from qlens.losses.layout.signature import Memo

LONGEST = 10_000  # characters of one spec or of a list of them
PARSED = 10_000  # specs that are remembered
WHOLE = 2**63  # torch takes integers below this
_HINTS = Memo()


@dataclass(frozen=True)
class Between:
    """A closed range for a number, open below with ``open_low``, as a marker inside ``Annotated``."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


Share = Annotated[float, Between(0, 1)]  # in [0, 1]
Weight = Annotated[float, Between(0)]  # at least 0
Positive = Annotated[float, Between(0, open_low=True)]  # above 0


def defaults(fn: Callable) -> dict[str, Any]:
    """The default of every parameter of a function that a user may set, by name."""
    arguments = calling.signature(fn).values()
    return {p.name: p.default for p in arguments if p.default is not p.empty and p.name not in calling.CALLERS}


def missing(fn: Callable) -> tuple[str, ...]:
    """Parameters that a user must give: without a default, and no input of a loss."""
    return calling.inputs(fn).missing


def bind(method: str, fn: Callable, values: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a method: the given values over the defaults, with names, types and ranges checked.

    Args:
        method: the method's name, for messages.
        fn: its function.
        values: parameters by name.

    Raises:
        ParameterError: an unknown name, a wrong type or a value out of range; the message says what would be right.
    """
    bound, annotated, bare = defaults(fn), hints(fn), missing(fn)
    for name in bare:
        if name not in values:
            raise ParameterError(lacks(fn, name))
    for name, value in values.items():
        if name not in bound and name not in bare:
            known = ", ".join(dict.fromkeys([*bare, *defaults(fn)])) or "it has none"
            raise ParameterError(f"{method} has no parameter {brief(name)} (parameters: {known})")
        hint = annotated.get(name, type(bound[name]) if bound.get(name) is not None else Any)
        if (wanted := _misfit(value, hint)) is not None:
            raise ParameterError(f"{method}: {name} = {brief(value)}, but it must be {wanted}")
        if name == "clamp" and isinstance(value, tuple | list) and len(value) == 2 and value[0] > value[1]:
            raise ParameterError(f"{method}: clamp = {brief(value)}, but it must be (low, high), low first")
        bound[name] = float(value) if _is_float(hint) else tuple(value) if isinstance(value, list) else value
    return bound


def lacks(fn: Callable, name: str) -> str:
    """The message about a parameter without a value."""
    who = calling.name_of(fn)
    if name == "self":
        return f"{who} is a method without its object: name the class, or give the method of an instance"
    return (
        f"{who}: {name!r} has no default and is no input that qlens knows: give {name!r} a default, or a value, "
        f'FILE.py:"{who}({name}=...)" on the command line, functools.partial({who}, {name}=...) in Python'
    )


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a spec like 'name(a=1, b="x")', whose values are Python literals.

    Raises:
        InputError: the spec is malformed.

    Example:
        >>> parse("beyond_log(alpha=0.5)")
        ('beyond_log', {'alpha': 0.5})
    """
    if len(spec) > LONGEST:
        raise InputError(f"spec {brief(spec)} has {len(spec)} characters: at most {LONGEST} are read")
    name, values = _parsed(spec)
    return name, copy.deepcopy(values)


@functools.lru_cache(maxsize=PARSED)
def _parsed(spec: str) -> tuple[str, dict[str, Any]]:
    head, bracket, tail = spec.strip().partition("(")
    if not bracket:
        return head, {}
    try:
        call = ast.parse(f"f({tail}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("only name=value arguments are allowed")
        if not isinstance(call.func, ast.Name):
            raise ValueError("one pair of brackets is allowed")
        names = [k.arg for k in call.keywords if k.arg]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} is given twice")
        return head.strip(), {k.arg: _literal(k.arg, k.value) for k in call.keywords if k.arg}
    except (ValueError, SyntaxError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
    except (RecursionError, MemoryError):  # the parser's own limits
        reason = "it is nested too deeply"
    raise InputError(f"spec {brief(spec)} does not read as name(parameter=value, ...): {reason}")


def _literal(name: str, node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:  # TypeError: {[]: 1}, an unhashable key
        raise ValueError(f"{name} must be a literal like 2.0, 'x', True, None or (0.5, 2.0)") from error


def split_specs(text: str) -> list[str]:
    """The specs of a comma-separated list; commas inside brackets do not separate.

    Raises:
        InputError: an empty entry, or a list that is too long.

    Example:
        >>> split_specs("a,b(x=1,y=2)")
        ['a', 'b(x=1,y=2)']
    """
    if len(text) > LONGEST:
        raise InputError(f"the list {brief(text)} has {len(text)} characters: at most {LONGEST} are read")
    specs, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            specs.append(text[start:at])
            start = at + 1
    listed = [spec.strip() for spec in [*specs, text[start:]]]
    if not all(listed):
        raise InputError(f"the list {brief(text)} has an empty entry: separate names by single commas, like 'sft,dft'")
    return listed


def show(name: str, params: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """The spec string of a method at these parameters: its name and the parameters that differ from the defaults."""
    changed = {key: value for key, value in params.items() if key not in default or not _alike(value, default[key])}
    return f"{name}({', '.join(f'{k}={_shown(v)}' for k, v in changed.items())})" if changed else name


def _alike(value: Any, other: Any) -> bool:
    """Whether two values of a parameter are equal; tensors and arrays by their entries."""
    if value is other:
        return True
    if type(value) is not type(other):
        return not _by_entry(value) and not _by_entry(other) and bool(value == other)
    return _shown(value) == _shown(other) if _by_entry(value) else bool(value == other)


def _by_entry(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and bool(getattr(value, "ndim", 0))


def _shown(value: Any) -> str:
    """A value's repr; of a tensor or an array its shape and a digest of its entries, which fit on a line."""
    if not _by_entry(value):
        return repr(value)
    entries = value.detach().cpu().double().numpy() if hasattr(value, "detach") else value
    digest = hashlib.blake2b(entries.tobytes(), digest_size=4).hexdigest()
    return f"<{type(value).__name__} {tuple(value.shape)} {digest}>"


def ends(fn: Callable) -> list[dict[str, Any]]:
    """Parameter sets at which limits and identities may stand: one parameter at 0, at 1, or at another of its choices.

    Example:
        >>> def f(tokens, *, eta: Share = 0.5, square: bool = False): ...
        >>> ends(f)
        [{'eta': 0.0}, {'eta': 1.0}, {'square': True}]
    """
    annotated = hints(fn)
    default = defaults(fn)
    points = [{name: value} for name in default for value in special_values(annotated.get(name, Any))]
    return [point for point in points if any(not _alike(value, default[name]) for name, value in point.items())]


def special_values(hint: Any) -> list[Any]:
    """The values of an annotation at which a limit or an identity may stand."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return [v for v in (0.0, 1.0) if inner[0] is float and v in inner[1]]
    if origin is Literal:
        return list(inner)
    if origin is not None and origin is not tuple:
        return [value for side in inner for value in special_values(side)]
    return {bool: [False, True], float: [0.0, 1.0], type(None): [None]}.get(hint, [])


def hints(fn: Callable) -> Mapping[str, Any]:
    """The annotations of a function's arguments; none for callable objects.

    Raises:
        InputError: an annotation cannot be evaluated.
    """
    return _HINTS.get(fn, "hints", lambda: _hints(fn))


def _hints(fn: Callable) -> Mapping[str, Any]:
    if not inspect.isroutine(fn):
        return {}
    try:
        return typing.get_type_hints(fn, include_extras=True)
    except NameError:  # a name imported for type checkers only: the types of the defaults are used instead
        return {}
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{calling.name_of(fn)}: an annotation of it cannot be evaluated: {reason}") from error


def _is_float(hint: Any) -> bool:
    return (typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint) is float


def _misfit(value: Any, hint: Any) -> str | None:
    """What ``value`` should be, in words; None where it fits."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        base, *marks = inner
        if (wrong := _misfit(value, base)) is not None:
            return f"{wrong} in {marks[0]}"
        return next((f"in {mark}" for mark in marks if isinstance(mark, Between) and value not in mark), None)
    if origin is Literal:
        return None if value in inner else "one of " + ", ".join(map(repr, inner))
    if origin is tuple and inner[-1] is Ellipsis:
        fits = isinstance(value, tuple | list) and len(value) and all(_misfit(v, inner[0]) is None for v in value)
        return None if fits else f"({_named(inner[0])}, ...)"
    if origin is tuple:
        fits = isinstance(value, tuple | list) and len(value) == len(inner)
        fits = fits and all(_misfit(v, h) is None for v, h in zip(value, inner, strict=True))
        return None if fits else f"({', '.join(map(_named, inner))})"
    if origin in (typing.Union, types.UnionType):
        wanted = [_misfit(value, side) for side in inner]
        return None if None in wanted else " or ".join(w for w in wanted if w)
    if hint is float:
        return None if _finite(value) else "a finite number"
    if hint is int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return None if whole and abs(value) < WHOLE else "a whole number below 2^63" if whole else "a whole number"
    kind = hint if origin is None else origin
    if kind in (Any, inspect.Parameter.empty) or not isinstance(kind, type) or isinstance(value, kind):
        return None
    return "None" if kind is type(None) else f"a {_named(hint)}"


def _finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _named(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))
