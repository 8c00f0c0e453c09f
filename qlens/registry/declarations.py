"""Declarations: checks of the fields of a method's card, at registration."""

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
    """Check every field of a card; functions of the parameters are checked by ``declared``.

    Args:
        name: the method's name.
        card: fields of ``Method`` by name.

    Raises:
        InputError: a field has a value of the wrong kind; the message says what would be right.
    """
    for field, value in card.items():
        if not (field in OF_PARAMETERS and callable(value) and not isinstance(value, type)):
            check_field(name, field, value)


def check_field(name: str, field: str, value: Any) -> None:
    """Check the value of one field, that is not a function of the parameters.

    Raises:
        InputError: it is of the wrong kind.
    """
    requirement = ""
    if field in CHOICES:
        if not isinstance(value, str) or value not in CHOICES[field]:
            requirement = " or ".join(repr(each) for each in CHOICES[field] if each)
    elif field in TRUTHS:
        if not any(value is each for each in TRUTHS[field]):
            requirement = " or ".join(repr(each) for each in TRUTHS[field])
    elif field == "structure":
        if not isinstance(value, GeometricMixture) and not (isinstance(value, str) and value in ("label", "dense")):
            requirement = "'label', 'dense' or a GeometricMixture like qlens.GeometricMixture(\"teacher\")"
    elif field in TEXTS:
        requirement = "" if isinstance(value, str) else "a string"
    elif field in FUNCTIONS:
        requirement = "" if value is None or callable(value) else "a function"
    elif field == "needs":
        requirement = "" if _are_strings(value) else "names of fields of Tokens, like ('teacher',)"
    elif field == "differences":
        requirement = "" if _are_strings(value) else "sentences, like ('The code divides by k.',)"
    elif field == "cites":
        requirement = "" if _are_strings(value) else "keys of references.bib or BibTeX entries, like ('wu2025dft',)"
    elif field == "modes":
        by_name = isinstance(value, Mapping) and all(isinstance(preset, str) for preset in value)
        valid = by_name and all(isinstance(point, Mapping) for point in value.values())
        requirement = "" if valid else "a dict of dicts like {'v1': {'factor': 0.5}}"
    if requirement:
        functions = " or a function of the parameters" if field in OF_PARAMETERS else ""
        raise InputError(f"register({name!r}): {field} must be {requirement}{functions}, got {brief(value)}")
    if field == "needs":
        _check_needs(name, value)
    if field == "cites":
        for key in value or ():
            citation(key)


def check_function(name: str, value: Any) -> None:
    """Check that a decorator got a function.

    Raises:
        InputError: it did not.
    """
    if not callable(value):
        raise InputError(f"{name} decorates a function, got {brief(value)}: write it above def")


def declared(name: str, field: str, function: Callable, params: Mapping[str, Any]) -> Any:
    """The value of a field that is a function of the parameters.

    Raises:
        InputError: the function cannot be called with the parameters, or returns a value of the wrong kind.
    """
    try:
        value = function(**params)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        names = ", ".join(params) or "none"
        raise InputError(
            f"register({name!r}): {field} as a function raises {reason}; it is called with all parameters by name ({names}), "
            f"lambda {', '.join([*list(params)[:1], '**_'])}: ..."
        ) from error
    check_field(name, field, value)
    return value


def _check_needs(name: str, needs: Any) -> None:
    if unknown := [need for need in needs if need not in Tokens.__dataclass_fields__]:
        raise UnknownName.among("field of Tokens in needs", unknown[0], Tokens.__dataclass_fields__)
    if always := [need for need in needs if need in ("logits", "labels")]:
        raise InputError(f"register({name!r}): needs names {always[0]}, which every method has: leave it out")


def _are_strings(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(each, str) for each in value)
