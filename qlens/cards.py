"""Cards: what the registry says about its methods, for the terminal, the README and JSON, all from the same fields."""

import inspect
import textwrap
from typing import Any

from qlens import params
from qlens.registry import Variant, get, names

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
        "simplex": variant.simplex,
        "denominator": variant.denominator,
        "derived": variant.derived,
        "parameters": variant.params,
        "limits": method.limits,
        "paper": variant.paper,
    }


def summaries() -> list[dict[str, Any]]:
    """The card of every registered method, by name."""
    return [summary(get(name)) for name in names()]


def markdown() -> str:
    """The table of methods as the README shows it."""
    head = "| method | trust in the label | where the rest goes | scale | needs | source |"
    rows = [head, "|---|---|---|---|---|---|"]
    for card in summaries():
        given = ", ".join(f"{name}={value!r}" for name, value in card["parameters"].items())
        cells = (f"`{card['name']}({given})`", card["trust"], card["residual"], card["scale"])
        rows.append(f"| {' | '.join(cells)} | {', '.join(card['needs']) or '-'} | {card['paper']} |")
    return "\n".join(rows)


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
        f"  mean over            {variant.denominator} tokens",
        f"  identity             {'by construction: the target is read from the loss' if variant.derived else 'a real test'}",
    ]
    if fields["limits"]:
        lines.append(f"  limits               {fields['limits']}")
    lines += [f"  source               {fields['paper'] or '-'}", f"  family               {variant.family}"]
    default = params.defaults(variant.method.fn)
    if variant.params:
        lines += ["", "Parameters"]
        for name, value in variant.params.items():
            changed = "" if value == default[name] else f" (default {default[name]!r})"
            lines.append(f"  {name} = {value!r}{changed}")
    described = inspect.getdoc(variant.method.fn)
    if described:
        lines += ["", textwrap.indent(described.partition("\nExample:")[0].strip(), "  ")]
    return "\n".join(lines)
