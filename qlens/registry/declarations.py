"""Declarations: what the fields of a method's card may hold, checked where the method is registered."""

from collections.abc import Callable, Mapping
from typing import Any

from qlens.core.errors import InputError, UnknownName, brief
from qlens.core.tokens import Tokens
from qlens.registry.citations import citation
from qlens.registry.structure import GeometricMixture

CHOICES = {
    "scope": ("token", "sequence", "pair", "batch", "parameters", ""),
    "denominator": ("valid", "selected"),
    "coupled": ("sequence", "pair", ""),
}
TRUTHS = {"simplex": (True, False, None), "invariant": (True, False)}
TEXTS = ("title", "paper", "family", "trusted", "residual", "scale", "limits", "code", "where")
FUNCTIONS = ("printed", "on_model", "on_start")
OF_PARAMETERS = (*CHOICES, *TRUTHS, "needs", "structure")  # fields that may be functions of the parameters


def check_card(name: str, card: Mapping[str, Any]) -> None:
    """Whether every field of a card holds what it may.

    Args:
        name: the method's.
        card: fields of ``Method`` by name.

    Raises:
        InputError: one does not; the field, its value and what would be right are named.
    """
    for field, value in card.items():
        if not (field in OF_PARAMETERS and callable(value) and not isinstance(value, type)):
            check_field(name, field, value)


def check_field(name: str, field: str, value: Any) -> None:
    """Whether a value is one of a field's own, not a function of the parameters.

    Raises:
        InputError: it is not.
    """
    wanted = ""
    if field in CHOICES:
        if not isinstance(value, str) or value not in CHOICES[field]:
            wanted = " or ".join(repr(each) for each in CHOICES[field] if each)
    elif field in TRUTHS:
        if not any(value is each for each in TRUTHS[field]):
            wanted = " or ".join(repr(each) for each in TRUTHS[field])
    elif field == "structure":
        if not isinstance(value, GeometricMixture) and not (isinstance(value, str) and value in ("label", "dense")):
            wanted = "'label', 'dense' or a GeometricMixture like qlens.GeometricMixture(\"teacher\")"
    elif field in TEXTS:
        wanted = "" if isinstance(value, str) else "a string"
    elif field in FUNCTIONS:
        wanted = "" if value is None or callable(value) else "a function"
    elif field == "needs":
        wanted = "" if _are_strings(value) else "names of fields of Tokens, like ('teacher',)"
    elif field == "differences":
        wanted = "" if _are_strings(value) else "sentences, like ('The code divides by k.',)"
    elif field == "cites":
        wanted = "" if _are_strings(value) else "keys of references.bib or BibTeX entries, like ('wu2025dft',)"
    elif field == "modes":
        named = isinstance(value, Mapping) and all(isinstance(mode, str) for mode in value)
        whole = named and all(isinstance(point, Mapping) for point in value.values())
        wanted = "" if whole else "a dict of dicts like {'v1': {'factor': 0.5}}"
    if wanted:
        functions = " or a function of the parameters" if field in OF_PARAMETERS else ""
        raise InputError(f"register({name!r}): {field} must be {wanted}{functions}, got {brief(value)}")
    if field == "needs":
        _check_needs(name, value)
    if field == "cites":
        for key in value:
            citation(key)


def check_function(name: str, value: Any) -> None:
    """Whether a decorator was given something to call.

    Raises:
        InputError: it was not.
    """
    if not callable(value):
        raise InputError(f"{name} decorates a function, got {brief(value)}: write it above def")


def declared(name: str, field: str, function: Callable, params: Mapping[str, Any]) -> Any:
    """What a function of the parameters says of a field.

    Raises:
        InputError: it cannot be called with the parameters, or says what the field cannot hold.
    """
    try:
        value = function(**params)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        takes = ", ".join(params) or "none"
        raise InputError(
            f"register({name!r}): {field} as a function raises {said}; it is called with all parameters by name ({takes}), "
            f"lambda {', '.join([*list(params)[:1], '**_'])}: ..."
        ) from error
    check_field(name, field, value)
    return value


def _check_needs(name: str, needs: Any) -> None:
    if strange := [need for need in needs if need not in Tokens.__dataclass_fields__]:
        raise UnknownName.among("field of Tokens in needs", strange[0], Tokens.__dataclass_fields__)
    if given := [need for need in needs if need in ("logits", "labels")]:
        raise InputError(f"register({name!r}): needs names {given[0]}, which every method has: leave it out")


def _are_strings(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(each, str) for each in value)
