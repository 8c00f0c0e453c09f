"""The registry: methods by name, and variants from names, specs, files and functions."""

import inspect
import keyword
from collections.abc import Callable, Mapping
from typing import Any

from qlens import calling, params, userfiles
from qlens.errors import InputError, UnknownName, brief
from qlens.guards import blamed
from qlens.tokens import Tokens
from qlens.variant import Method, Variant

SCOPES = ("token", "sequence", "pair", "batch", "parameters", "")
DENOMINATORS = ("valid", "selected")
_METHODS: dict[str, Method] = {}


def register(name: str, **card: Any) -> Callable[[Callable], Method]:
    """Decorator: register a target ``f(tokens) -> Target``, a loss ``f(tokens) -> (N,)`` or a loss ``f(logits, labels)``.

    Keyword-only arguments of the function are the method's parameters. ``card`` takes the fields of
    :class:`Method`: title, paper, family, scope, needs, simplex, ...

    Raises:
        InputError: the name is taken (both places are named), not an identifier, or a field of the card is unknown.

    Example:
        >>> import qlens
        >>> @qlens.register("half_nll_example")
        ... def half_nll_example(logits, labels, *, factor=0.5):
        ...     import torch.nn.functional as F
        ...     return factor * F.cross_entropy(logits, labels)
        >>> qlens.get("half_nll_example").derived
        True
    """
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise InputError(f"a method's name must be an identifier like 'my_loss', got {brief(name)}")

    def add(fn: Callable) -> Method:
        method = _method(name, fn, **card)
        if name in _METHODS and not _redefined(_METHODS[name].fn, fn):
            raise InputError(f"method {name!r} is registered twice: {_METHODS[name].where} and {method.where}")
        _METHODS[name] = method
        return method

    return add


def names() -> tuple[str, ...]:
    """All registered names, sorted.

    Example:
        >>> import qlens
        >>> "target_sft" in qlens.names()
        True
    """
    return tuple(sorted(_METHODS))


def get(spec: str, **given: Any) -> Variant:
    """A variant by name, by spec string, by NAME@MODE, or by FILE.py:FUNCTION, with parameters.

    Raises:
        UnknownName: no such method or mode (near names are suggested), file or function.
        ParameterError: a parameter is unknown, of the wrong type or out of range.

    Example:
        >>> import qlens
        >>> qlens.get("label_smoothing(epsilon=0.2)").params["epsilon"]
        0.2
        >>> qlens.get("asft_anchored@v1").params["direction"]
        'reverse'
    """
    if not isinstance(spec, str):
        raise InputError(f"a spec is a string like 'dft' or 'kd(temperature=2.0)', got {type(spec).__name__}")
    name, parsed = params.parse(spec)
    given = {**parsed, **given}
    if ".py:" in name:
        return _from_file(name).variant(**given)
    if name.endswith(".py"):
        raise InputError(f"{spec} is a file: name the function in it, {name}:FUNCTION")
    name, at, mode = name.partition("@")
    if name not in _METHODS:
        raise UnknownName.among("method", name, names())
    modes = _METHODS[name].modes
    if at and mode not in modes:
        raise UnknownName.among(f"mode of {name}", mode, tuple(modes))
    return _METHODS[name].variant(**(dict(modes[mode]) if at else {}) | given)


def resolve(thing: Variant | str | Callable) -> Variant:
    """A Variant from a Variant, a spec, a registered method or a callable; anything else raises InputError."""
    if isinstance(thing, Variant):
        return thing
    if isinstance(thing, str):
        return get(thing)
    if isinstance(thing, Method):
        return thing.variant()
    if callable(thing):
        with blamed(calling.name_of(thing)):
            return _method(calling.name_of(thing), thing).variant()
    raise InputError(f"a loss is a Variant, a spec string or a callable, got {type(thing).__name__}")


def _method(name: str, fn: Callable, **card: Any) -> Method:
    unknown = sorted(set(card) - set(Method.__dataclass_fields__))
    if unknown:
        raise InputError(f"register({name!r}): unknown field {unknown[0]!r} of the card")
    for key, allowed in (("scope", SCOPES), ("denominator", DENOMINATORS)):
        if key in card and not callable(card[key]) and card[key] not in allowed:
            raise InputError(
                f"register({name!r}): {key} must be {' or '.join(repr(each) for each in allowed if each)}, got {brief(card[key])}"
            )
    fn = calling.opened(fn)
    asked, needs = calling.extra_inputs(fn), card.get("needs", ())
    if callable(needs) and asked:
        raise InputError(f"register({name!r}): needs as a function does not go with bare arguments like {asked[0]!r}")
    if not callable(needs):
        card["needs"] = (*needs, *(n for n in asked if n not in needs))
    modes = card.get("modes", {})
    if not isinstance(modes, Mapping) or not all(isinstance(point, Mapping) for point in modes.values()):
        raise InputError(
            f"register({name!r}): modes must be a dict of dicts like {{'v1': {{'factor': 0.5}}}}, got {brief(modes)}"
        )
    for mode, point in modes.items():
        params.bind(f"{name}@{mode}", fn, point)
    declared = needs(**params.defaults(fn)) if callable(needs) else needs
    if strange := [need for need in declared if need not in Tokens.__dataclass_fields__]:
        raise UnknownName.among("field of Tokens in needs", strange[0], Tokens.__dataclass_fields__)
    if given := [need for need in declared if need in ("logits", "labels")]:
        raise InputError(f"register({name!r}): needs names {given[0]}, which every method has: leave it out")
    code = getattr(inspect.unwrap(fn), "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}" if code else repr(fn)
    card.setdefault("title", (inspect.getdoc(fn) or "").partition("\n")[0])
    return Method(name=name, fn=fn, where=where, **card)


def _redefined(old: Callable, new: Callable) -> bool:
    """Whether a notebook cell or a user's file was run again: the same function, defined anew."""
    place = [(getattr(fn, "__module__", ""), getattr(fn, "__qualname__", "")) for fn in (old, new)]
    return place[0] == place[1] and place[0][0].startswith(("__main__", "qlens_user_"))


def _from_file(name: str) -> Method:
    """The method that FILE.py:FUNCTION names: registered there, or a plain loss."""
    found = userfiles.function(name)
    return found if isinstance(found, Method) else _method(name, found)


def methods() -> Mapping[str, Method]:
    """The registered methods by name, sorted."""
    return {name: _METHODS[name] for name in names()}
