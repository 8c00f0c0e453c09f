"""The registry: methods by name, and variants from names, specs, files and functions."""

import inspect
import keyword
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, overload

from qlens.core.deprecation import warn
from qlens.core.errors import InputError, UnknownName, brief
from qlens.losses import calling, user_files
from qlens.losses.user_code import user_errors
from qlens.registry import params
from qlens.registry.declarations import check_card, check_function
from qlens.registry.method import Method
from qlens.registry.variant import Variant

logger = logging.getLogger(__name__)

FIELDS = tuple(field for field in Method.__dataclass_fields__ if field not in ("name", "fn"))
_METHODS: dict[str, Method] = {}


@overload
def register(name: Callable) -> Method:
    """Without brackets, under the function's own name."""


@overload
def register(name: str | None = None, **card: Any) -> Callable[[Callable], Method]:
    """With a name or with fields of the card."""


def register(name: str | Callable | None = None, **card: Any) -> Method | Callable[[Callable], Method]:
    """Decorator that registers a loss or a target under a name.

    The first parameter of the function tells what it is: ``f(tokens)`` returns a ``Target`` or losses (N,),
    ``f(logits, labels)`` a loss with any reduction, and so on (see ``qlens.explain``). Its other parameters are the
    method's parameters. Running a notebook cell or reloading a module again replaces the method, and a log message
    says so.

    Args:
        name: the method's name, an identifier; by default the function's own (``@qlens.register`` without brackets).
        card: fields of :class:`Method`: title, paper, cites, scope, needs, simplex, ...

    Returns:
        The decorator; without brackets, the registered ``Method``.

    Raises:
        InputError: the name is taken or no identifier, or a field of the card is unknown or holds a wrong value.

    Example:
        >>> import qlens
        >>> import torch.nn.functional as F
        >>> @qlens.register
        ... def half_nll_example(logits, labels, *, factor=0.5):
        ...     return factor * F.cross_entropy(logits, labels)
        >>> qlens.get("half_nll_example").derived
        True
        >>> @qlens.register("masked_nll_example", scope="token", title="NLL where p_y is above a threshold")
        ... def masked_nll_example(tokens, *, threshold=0.1):
        ...     keep = (tokens.label_probs > threshold).to(tokens.label_probs)
        ...     return qlens.Target.mix(tokens, trust=keep, residual="student")
    """
    if name is not None and not isinstance(name, str):
        if not callable(name):
            raise _not_a_name(name)
        return _add(_own_name(name), name, {})
    if name is not None and not _is_name(name):
        raise _not_a_name(name)
    if "bibtex" in card:
        warn("register(bibtex=)", "cites=(entry,)")
        card["cites"] = (card.pop("bibtex"),)
    _check_fields(name or "", card)
    return lambda fn: _add(name or _own_name(fn), fn, dict(card))


def _add(name: str, fn: Callable, card: dict[str, Any]) -> Method:
    """Register a function under a name."""
    check_function(f"register({name!r})", fn)
    method = _method(name, fn, **card)
    old = _METHODS.get(name)
    if old is not None and not _is_redefinition(old.fn, fn):
        raise InputError(
            f"method {name!r} is registered twice: {old.where} and {method.where}; give one of them another name"
        )
    if old is not None and not old.fn.__module__.startswith("qlens_user_"):  # a file that is read again
        logger.warning("qlens: %r replaces the method registered at %s", name, old.where)
    _METHODS[name] = method
    return method


def names() -> tuple[str, ...]:
    """All registered names, sorted.

    Example:
        >>> import qlens
        >>> "target_sft" in qlens.names()
        True
    """
    return tuple(sorted(_METHODS))


def methods() -> Mapping[str, Method]:
    """The registered methods by name, sorted."""
    return {name: _METHODS[name] for name in names()}


@contextmanager
def temporary() -> Iterator[None]:
    """Within it methods may be registered and replaced; afterwards the registry is as it was.

    Example:
        >>> with temporary():
        ...     _ = register("gone_example")(lambda logits, labels: logits.sum())
        >>> "gone_example" in names()
        False
    """
    before = dict(_METHODS)
    try:
        yield
    finally:
        _METHODS.clear()
        _METHODS.update(before)


def get(spec: str, **parameters: Any) -> Variant:
    """A variant by name, spec string, NAME@PRESET or FILE.py:FUNCTION.

    Args:
        spec: ``"dft"``, ``"kd(temperature=2.0)"``, ``"eaft@axolotl"`` or ``"my_loss.py:f(a=3.0)"``.
        parameters: values of parameters, before those of the spec.

    Returns:
        The method at these parameters.

    Raises:
        UnknownName: no such method or preset (near names are suggested), file or function.
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
    parameters = {**parsed, **parameters}
    if ".py:" in name:
        return _from_file(name).variant(**parameters)
    if name.endswith(".py"):
        raise InputError(f"{spec} is a file: name the function in it, {name}:FUNCTION")
    name, at, preset = name.partition("@")
    if name not in _METHODS:
        raise UnknownName.among("method", name, names())
    presets = _METHODS[name].modes
    if at and preset not in presets:
        raise UnknownName.among(f"preset of {name}", preset, tuple(presets))
    return _METHODS[name].variant(**(dict(presets[preset]) if at else {}) | parameters)


def resolve(loss: Variant | str | Callable) -> Variant:
    """The Variant of a Variant, a spec, a registered method or a function.

    Raises:
        InputError: anything else.
    """
    if isinstance(loss, Variant):
        return loss
    if isinstance(loss, str):
        return get(loss)
    if isinstance(loss, Method):
        return loss.variant()
    if callable(loss):
        with user_errors(calling.name_of(loss)):
            return _method(calling.name_of(loss), loss).variant()
    raise InputError(f"a loss is a Variant, a spec string or a callable, got {type(loss).__name__}")


def _method(name: str, fn: Callable, **card: Any) -> Method:
    """A Method of a function and the checked fields of a card, completed by what the function itself shows."""
    fn = calling.opened(fn)
    asked, needs = calling.extra_inputs(fn), card.get("needs", ())
    if callable(needs) and asked:
        raise InputError(f"register({name!r}): needs as a function does not go with bare arguments like {asked[0]!r}")
    if not callable(needs):
        card["needs"] = (*needs, *(n for n in asked if n not in needs))
    for preset, point in card.get("modes", {}).items():
        params.bind(f"{name}@{preset}", fn, point)
    card = {key: tuple(value) if isinstance(value, list) else value for key, value in card.items()}
    code = getattr(inspect.unwrap(fn), "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}" if code else repr(fn)
    card.setdefault("family", _family(fn))
    card.setdefault("title", (inspect.getdoc(fn) or "").partition("\n")[0])
    method = Method(name=name, fn=fn, **{"where": where, **card})
    if not params.missing(fn):
        method.variant().check_declared()
    return method


def _check_fields(name: str, card: Mapping[str, Any]) -> None:
    """Check that a card has known fields alone, each with a value of its kind."""
    if unknown := sorted(set(card) - set(FIELDS)):
        raise InputError(f"register({name!r}): unknown field {unknown[0]!r} of the card, which has {', '.join(FIELDS)}")
    check_card(name, card)


def _is_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _own_name(fn: Callable) -> str:
    """The name that a function is registered under by default."""
    name = getattr(fn, "__name__", "")
    if not _is_name(name):
        raise _not_a_name(fn)
    return name


def _not_a_name(name: Any) -> InputError:
    hint = ": write @qlens.register('my_loss') above its def" if callable(name) else ""
    return InputError(f"a method's name must be an identifier like 'my_loss', got {brief(name)}{hint}")


def _family(fn: Callable) -> str:
    """The folder of one of qlens' own methods, "distillation" of qlens.variants.distillation.kd; "user" for any other."""
    module = getattr(inspect.unwrap(fn), "__module__", None) or ""
    return module.split(".")[2] if module.startswith("qlens.variants.") else "user"


def _is_redefinition(old: Callable, new: Callable) -> bool:
    """Whether the same function is defined anew: a cell run again, a module reloaded, a file read again.

    In a notebook or at a prompt, where nothing is imported from ``__main__``, any two of its functions are.
    """
    place = [(getattr(fn, "__module__", ""), getattr(fn, "__qualname__", "")) for fn in (old, new)]
    interactive = not hasattr(sys.modules["__main__"], "__file__")
    return place[0] == place[1] or (interactive and place[0][0] == place[1][0] == "__main__")


def _from_file(name: str) -> Method:
    """The method that FILE.py:FUNCTION names: registered there, or a plain loss."""
    function = user_files.function(name)
    return function if isinstance(function, Method) else _method(name, function)
