"""The registry: methods by name, and variants from names, specs, files and functions."""

import inspect
import keyword
from collections.abc import Callable, Mapping
from typing import Any

from qlens.core.errors import InputError, UnknownName, brief
from qlens.losses import calling, user_files
from qlens.losses.user_code import blamed
from qlens.registry import params
from qlens.registry.declarations import check_card, check_function
from qlens.registry.variant import Method, Variant

FIELDS = tuple(field for field in Method.__dataclass_fields__ if field not in ("name", "fn"))
_METHODS: dict[str, Method] = {}


def register(name: str, **card: Any) -> Callable[[Callable], Method]:
    """Decorator: register a target ``f(tokens) -> Target``, a loss ``f(tokens) -> (N,)`` or a loss ``f(logits, labels)``.

    Keyword-only arguments of the function are the method's parameters. ``card`` takes the fields of
    :class:`Method`: title, paper, family, scope, needs, simplex, ...

    Raises:
        InputError: the name is taken (both places are named), not an identifier, or a field of the card is unknown or holds what
            it may not.

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
        hint = ": write @qlens.register('my_loss') above its def" if callable(name) else ""
        raise InputError(f"a method's name must be an identifier like 'my_loss', got {brief(name)}{hint}")
    _check_card(name, card)

    def add(fn: Callable) -> Method:
        check_function(f"register({name!r})", fn)
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
    fn = calling.opened(fn)
    asked, needs = calling.extra_inputs(fn), card.get("needs", ())
    if callable(needs) and asked:
        raise InputError(f"register({name!r}): needs as a function does not go with bare arguments like {asked[0]!r}")
    if not callable(needs):
        card["needs"] = (*needs, *(n for n in asked if n not in needs))
    for mode, point in card.get("modes", {}).items():
        params.bind(f"{name}@{mode}", fn, point)
    _check_card(name, card)
    card = {key: tuple(value) if isinstance(value, list) else value for key, value in card.items()}
    code = getattr(inspect.unwrap(fn), "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}" if code else repr(fn)
    card.setdefault("family", _family(fn))
    card.setdefault("title", (inspect.getdoc(fn) or "").partition("\n")[0])
    method = Method(name=name, fn=fn, **{"where": where, **card})
    if not params.missing(fn):
        method.variant().check_declared()
    return method


def _check_card(name: str, card: Mapping[str, Any]) -> None:
    """Whether a card has known fields alone, each with a value that it may hold."""
    if unknown := sorted(set(card) - set(Method.__dataclass_fields__) | {"fn"} & set(card)):
        raise InputError(f"register({name!r}): unknown field {unknown[0]!r} of the card, which has {', '.join(FIELDS)}")
    check_card(name, card)


def _family(fn: Callable) -> str:
    """The folder in which a method of qlens is, as "distillation" of qlens.variants.distillation.kd; "user" for any other."""
    module = getattr(inspect.unwrap(fn), "__module__", None) or ""
    return module.split(".")[2] if module.startswith("qlens.variants.") else "user"


def _redefined(old: Callable, new: Callable) -> bool:
    """Whether a notebook cell or a user's file was run again: the same function, defined anew."""
    place = [(getattr(fn, "__module__", ""), getattr(fn, "__qualname__", "")) for fn in (old, new)]
    return place[0] == place[1] and place[0][0].startswith(("__main__", "qlens_user_"))


def _from_file(name: str) -> Method:
    """The method that FILE.py:FUNCTION names: registered there, or a plain loss."""
    found = user_files.function(name)
    return found if isinstance(found, Method) else _method(name, found)


def methods() -> Mapping[str, Method]:
    """The registered methods by name, sorted."""
    return {name: _METHODS[name] for name in names()}
