"""Cards: the metadata of methods as text, Markdown and JSON."""

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
    """The fields of a method's card at its parameters, as plain values for JSON.

    Example:
        >>> summary(get("dft"))["trust"]
        'p_y'
    """
    method = variant.method
    return {
        "name": variant.name,
        "title": variant.title,
        "family": variant.family,
        "trust": method.trusted or ("read from the loss" if variant.derived else "not declared"),
        "residual": method.residual or ("read from the loss" if variant.derived else "not declared"),
        "scale": method.scale,
        "needs": list(variant.needs),
        "scope": variant.scope,
        "structure": str(variant.structure),
        "simplex": variant.simplex,
        "invariant": variant.invariant,
        "denominator": variant.denominator,
        "derived": variant.derived,
        "parameters": variant.params,
        "modes": {preset: dict(point) for preset, point in method.modes.items()},
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
    """The cards by family, in the order of ``FAMILIES``, user methods last."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for fields in summaries():
        groups.setdefault(fields["family"], []).append(fields)
    in_order = [family for family in FAMILIES if family in groups]
    return {family: groups[family] for family in (*in_order, *sorted(set(groups) - set(FAMILIES)))}


def markdown() -> str:
    """The table of methods of ``variants/README.md``."""
    rows = [
        "| method | trust | residual | scale | needs | source |",
        "|---|---|---|---|---|---|",
    ]
    for family, cards in families().items():
        rows.append(f"| **{family}** | | | | | |")
        for fields in cards:
            cells = (f"`{fields['name']}`", fields["trust"], fields["residual"], fields["scale"])
            needs = ", ".join(fields["needs"]) or "-"
            rows.append(f"| {' | '.join(map(_cell, cells))} | {needs} | {fields['paper']} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def card(variant: Variant) -> str:
    """One method's card as text."""
    fields = summary(variant)
    simplex = {True: "always a distribution", False: "may leave the simplex", None: "not declared"}[fields["simplex"]]
    lines = [
        f"{variant.name}: {variant.title}" if variant.title else variant.name,
        "",
        "  gradient = scale (p - Q), Q = trust d + (1 - trust) residual; d: one-hot label, p: student",
        *_hanging("trust", fields["trust"]),
        *_hanging("residual", fields["residual"]),
        f"  scale                {fields['scale']}",
        f"  Q                    {simplex}",
        f"  needs                {', '.join(variant.needs) or 'logits and labels only'}",
        f"  scope                {variant.scope}",
        f"  structure            {structure_text(variant)}",
        f"  mean over            {variant.denominator} tokens",
        f"  target               {'derived from the loss' if variant.derived else 'explicit, tested against the loss'}",
    ]
    if not variant.invariant:
        lines.append("  sum(Q)               not 1 everywhere: the loss depends on raw logits")
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
        lines += ["", f"Presets, as {variant.name}@PRESET"]
        for preset, point in fields["modes"].items():
            lines.append(f"  {preset:<20} {', '.join(f'{k}={v!r}' for k, v in point.items()) or 'the defaults'}")
    if fields["differences"]:
        lines += ["", "Where paper, released code and the authors' table differ"]
        lines += [
            textwrap.fill(each, 118, initial_indent="  - ", subsequent_indent="    ") for each in fields["differences"]
        ]
    docstring = inspect.getdoc(variant.method.fn)
    if docstring:
        lines += ["", textwrap.indent(docstring.partition("\nExample:")[0].strip(), "  ")]
    return "\n".join(lines)


def structure_text(variant: Variant) -> str:
    """The declared structure of the logit gradient, in words."""
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
    """A field of the card, wrapped."""
    return textwrap.wrap(text, 118, initial_indent=f"  {name:<20} ", subsequent_indent=" " * 23)
