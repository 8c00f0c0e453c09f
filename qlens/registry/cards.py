"""Cards: what the registry says about its methods, for the terminal, the README and JSON, all from the same fields."""

import inspect
import textwrap
from typing import Any

from qlens.registry import params
from qlens.registry.registry import Variant, get, names

FAMILIES = (
    "likelihood",
    "selection",
    "entropy",
    "mixture",
    "reference",
    "distillation",
    "designed",
    "preference",
    "policy",
    "parameter",
)
COLUMNS = ("name", "trust", "residual", "scale", "needs", "paper")


def summary(variant: Variant) -> dict[str, Any]:
    """The fields of a method's card, as plain values.

    Example:
        >>> summary(get("dft"))["trust"]
        'p_y'
    """
    method = variant.method
    return {
        "name": variant.name,
        "title": variant.title,
        "family": variant.family,
        "trust": method.trusted or ("read from the loss" if variant.derived else "not said"),
        "residual": method.residual or ("read from the loss" if variant.derived else "not said"),
        "scale": method.scale,
        "needs": list(variant.needs),
        "scope": variant.scope,
        "structure": str(variant.structure),
        "simplex": variant.simplex,
        "invariant": variant.invariant,
        "denominator": variant.denominator,
        "derived": variant.derived,
        "parameters": variant.params,
        "modes": {mode: dict(point) for mode, point in method.modes.items()},
        "limits": method.limits,
        "differences": list(method.differences),
        "paper": variant.paper,
        "cites": list(method.cites),
        "code": method.code,
    }


def summaries() -> list[dict[str, Any]]:
    """The card of every registered method, by name."""
    return [summary(get(name)) for name in names()]


def families() -> dict[str, list[dict[str, Any]]]:
    """The cards by family: the families that have most to do with labels first, the user's own last."""
    found: dict[str, list[dict[str, Any]]] = {}
    for each in summaries():
        found.setdefault(each["family"], []).append(each)
    known = [family for family in FAMILIES if family in found]
    return {family: found[family] for family in (*known, *sorted(set(found) - set(FAMILIES)))}


def markdown() -> str:
    """The table of methods of ``variants/README.md``."""
    rows = [
        "| method | trust in the label | where the rest goes | scale | needs | source |",
        "|---|---|---|---|---|---|",
    ]
    for family, cards in families().items():
        rows.append(f"| **{family}** | | | | | |")
        for each in cards:
            cells = (f"`{each['name']}`", each["trust"], each["residual"], each["scale"])
            needs = ", ".join(each["needs"]) or "-"
            rows.append(f"| {' | '.join(map(_cell, cells))} | {needs} | {each['paper']} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def card(variant: Variant) -> str:
    """One method's card, for reading."""
    fields = summary(variant)
    simplex = {True: "always a distribution", False: "may leave the simplex", None: "not declared"}[fields["simplex"]]
    lines = [
        f"{variant.name}: {variant.title}" if variant.title else variant.name,
        "",
        f"  trust in the label   {fields['trust']}",
        f"  the rest goes to     {fields['residual']}",
        f"  scale                {fields['scale']}",
        f"  target               {simplex}",
        f"  needs                {', '.join(variant.needs) or 'logits and labels only'}",
        f"  scope                {variant.scope}",
        f"  structure            {structure_text(variant)}",
        f"  mean over            {variant.denominator} tokens",
        f"  identity             {'by construction: the target is read from the loss' if variant.derived else 'a real test'}",
    ]
    if not variant.invariant:
        lines.append("  sum(Q)               not 1 everywhere: the loss sees raw logits")
    if fields["limits"]:
        lines += _hanging("limits", fields["limits"])
    lines += [f"  source               {fields['paper'] or '-'}", f"  family               {variant.family}"]
    if fields["code"]:
        lines += _hanging("released code", fields["code"])
    default = params.defaults(variant.method.fn)
    if variant.params:
        lines += ["", "Parameters"]
        for name, value in variant.params.items():
            changed = "" if value == default[name] else f" (default {default[name]!r})"
            lines.append(f"  {name} = {value!r}{changed}")
    if fields["modes"]:
        lines += ["", f"Modes, as {variant.name}@MODE"]
        for mode, point in fields["modes"].items():
            lines.append(f"  {mode:<20} {', '.join(f'{k}={v!r}' for k, v in point.items()) or 'the defaults'}")
    if fields["differences"]:
        lines += ["", "Where paper, released code and the authors' table differ"]
        lines += [
            textwrap.fill(each, 118, initial_indent="  - ", subsequent_indent="    ") for each in fields["differences"]
        ]
    described = inspect.getdoc(variant.method.fn)
    if described:
        lines += ["", textwrap.indent(described.partition("\nExample:")[0].strip(), "  ")]
    return "\n".join(lines)


def structure_text(variant: Variant) -> str:
    """What the method's logit gradient is a function of, in words."""
    structure = variant.structure
    if structure == "label":
        return "label: a function of label probabilities, g = a (p - d)"
    if structure == "dense":
        return "dense: a function of whole distributions"
    if structure.model is None:
        return "mixture: the label and the uniform distribution"
    own = f"p^{structure.own:g} " if structure.own else ""
    return f"mixture: the label and {own}{structure.model}^{structure.other:g}, normalised"


def _hanging(name: str, text: str) -> list[str]:
    """A field of the card whose text may take several lines."""
    return textwrap.wrap(text, 118, initial_indent=f"  {name:<20} ", subsequent_indent=" " * 23)
