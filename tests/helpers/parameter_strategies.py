"""Hypothesis strategies for the parameters of a registered method, from its annotations."""

import inspect
import typing
from typing import Annotated, Any, Literal

from hypothesis import strategies as st

from qlens.registry.method import Method
from qlens.registry.params import Between
from qlens.registry.variant import Variant


def variants(method: Method) -> st.SearchStrategy[Variant]:
    """The method at any point of its parameters: each is left at its default, or drawn."""
    hints = typing.get_type_hints(method.fn, include_extras=True)
    defaults = {n: p.default for n, p in inspect.signature(method.fn).parameters.items() if p.default is not p.empty}
    each = {name: st.just(value) | values(hints[name], name) for name, value in defaults.items()}
    return st.fixed_dictionaries(each).map(lambda values_by_name: method.variant(**values_by_name))


def values(hint: Any, name: str) -> st.SearchStrategy:
    """Values that fit an annotation; numbers stay moderate, so that 1e-9 is a fair tolerance."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        (between,) = [mark for mark in inner if isinstance(mark, Between)]
        low, high = max(between.low, -3.0), min(between.high, 5.0)
        if inner[0] is int:
            return st.integers(int(max(low, between.low)), int(min(between.high, 40)))
        return st.floats(low + 0.05 if between.open_low else low, high).map(lambda x: round(x, 6))
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return st.lists(values(inner[0], name), min_size=1, max_size=3).map(tuple)
        return st.tuples(st.floats(0.05, 0.9), st.floats(1.0, 3.0))  # a clamp (low, high), or two temperatures
    if hint is bool:
        return st.booleans()
    if hint is type(None):
        return st.none()
    if hint is float:
        return st.floats(-2.0, 3.0).map(lambda x: round(x, 6))
    if hint is int:
        return st.integers(1, 40)
    if origin is not None:
        return st.one_of(*(values(side, name) for side in inner))
    raise TypeError(f"no values are known for {name}: {hint}")
