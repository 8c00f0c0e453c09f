"""Equivalences: methods with the same gradient, up to a factor or with the same target, and angles between the others."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.core.display import Result, latex_table
from qlens.core.errors import InputError, brief
from qlens.core.probes import probes
from qlens.core.tokens import MODELS, Tokens
from qlens.lens.identify.angles import NOTHING, angle_table, inner_products
from qlens.lens.identify.matching import method_gradient, points
from qlens.lens.implied import implied_target
from qlens.lens.text.sampling import WHOLE, rows_over_p
from qlens.registry import Variant, methods, params

INDENT: dict[str, Any] = {
    "initial_indent": "  ", "subsequent_indent": "      ", "break_long_words": False, "break_on_hyphens": False
}  # fmt: skip
KINDS = ("one gradient", "one up to a factor", "one target")
HEADS = ("The same gradient", "The same gradient up to a constant factor", "The same target at another scale")
RELATED, ENTRIES = 24, 2**20  # tokens of a long text on which equivalences are read, and their logits
SAME = 1e-6  # relative difference of two gradients that count as equal

CIRCUMSTANCES: dict[str, Callable[[Tokens], Tokens]] = {
    "always": lambda tokens: tokens,
    "where teacher, reference and old policy are one model": lambda tokens: tokens.replace(
        **{name: tokens.reference for name in MODELS if getattr(tokens, name) is not None}
    ),
    "where every other model is the student itself": lambda tokens: tokens.replace(
        **{name: tokens.logits for name in MODELS if getattr(tokens, name) is not None}
    ),
    "where every advantage is 1": lambda tokens: tokens.replace(advantage=torch.ones_like(tokens.label_probs)),
}
"""Conditions on the tokens; an equivalence is listed under the first that it needs."""


def tempered(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The cross-entropy of logits divided by a temperature, which no registered method is."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits / temperature, labels.long(), reduction="none")

    return loss


YARDSTICKS = {f"cross-entropy at temperature {t}": tempered(t) for t in (0.7, 2.0)}


@dataclass(frozen=True, eq=False)
class Relation:
    """Equivalent methods: ``specs`` with ``factors``, g = factor x g of the first; ``where`` is the condition."""

    kind: str
    specs: tuple[str, ...]
    factors: tuple[float, ...]
    where: str

    def __str__(self) -> str:
        if self.kind == "one target":
            return ", ".join(self.specs)
        first, *others = zip(self.specs, self.factors, strict=True)
        return " = ".join([first[0], *(spec if f == 1 else f"{1 / f:.5g} x {spec}" for spec, f in others)])


@dataclass(frozen=True, eq=False, repr=False)
class Distances(Result):
    """Equivalences and distances of the registered methods; printable.

    Args:
        relations: groups of equivalent methods.
        table: a row per pair of methods at their defaults: the angle between their gradients over all tokens, in degrees,
            and the logarithm of the ratio of their norms.
        left_out: methods that need a field which the tokens lack.
        relations_on: of a long text the number of tokens on which relations were read, and of all.
    """

    relations: list[Relation]
    table: pd.DataFrame
    left_out: tuple[str, ...]
    relations_on: tuple[int, int] | None = None

    def angles(self) -> pd.DataFrame:
        """The angles as a square, methods by methods, in degrees."""
        mirrored = self.table.rename(columns={"left": "right", "right": "left"})
        square = pd.concat([self.table, mirrored]).pivot(index="left", columns="right", values="angle")
        return square.fillna(0.0)

    def neighbours(self, number: int = 3) -> dict[str, list[tuple[str, float, float]]]:
        """The nearest other methods of every method: name, angle, log-ratio of the norms."""
        neighbours = {}
        for name in dict.fromkeys([*self.table["left"], *self.table["right"]]):
            rows = self.table[(self.table["left"] == name) | (self.table["right"] == name)]
            rows = rows.nsmallest(number, "angle")
            neighbours[name] = [
                (row.right, row.angle, row.log_ratio) if row.left == name else (row.left, row.angle, -row.log_ratio)
                for row in rows.itertuples()
            ]
        return neighbours

    def plot(self) -> Any:
        """The figure: the methods as a tree of the angles between their gradients (matplotlib)."""
        from qlens.analysis.plots import figure_atlas

        return figure_atlas(self.angles())

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "relations": [vars(relation) for relation in self.relations],
            "distances": self.table.to_dict("records"),
            "left_out": list(self.left_out),
        }

    def to_frame(self, methods: Sequence[str] | None = None) -> pd.DataFrame:
        """``table``: a row per pair of methods.

        Args:
            methods: the pairs of these methods alone.

        Raises:
            InputError: a method that the table does not have.
        """
        if methods is None:
            return self.table
        names = set(self.table["left"]) | set(self.table["right"])
        if isinstance(methods, str) or not names.issuperset(methods):
            raise InputError(f"methods must be a list of names among {', '.join(sorted(names))}, got {brief(methods)}")
        return self.table[self.table["left"].isin(methods) & self.table["right"].isin(methods)]

    def to_latex(
        self,
        columns: Sequence[str] | None = None,
        caption: str | None = None,
        label: str | None = None,
        methods: Sequence[str] | None = None,
        **options: Any,
    ) -> str:
        """Every method with its nearest other one in LaTeX (booktabs), or the pairs of some methods.

        Args:
            columns: of left, right, angle (degrees) and log_ratio (of the norms); by default all.
            caption, label, options: as of ``qlens.core.display.latex_table``.
            methods: print all pairs of these methods instead.

        Raises:
            InputError: an unknown column or method.
        """
        if methods is None:
            nearest = [(name, *near) for name, rows in self.neighbours(1).items() for near in rows]
            return latex_table(pd.DataFrame(nearest, columns=self.table.columns), columns, caption, label, **options)
        return latex_table(self.to_frame(methods), columns, caption, label, **options)

    def __repr__(self) -> str:
        methods = len({*self.table["left"], *self.table["right"]})
        return f"Distances({methods} methods, {len(self.relations)} groups of equivalent ones)"

    def __str__(self) -> str:
        lines = []
        for kind, head in zip(KINDS, HEADS, strict=True):
            for where in CIRCUMSTANCES:
                group = [r for r in self.relations if (r.kind, r.where) == (kind, where)]
                if group:
                    lines += [head + ("" if where == "always" else f", {where}")]
                    lines += [textwrap.fill(str(r), 118, **INDENT) for r in group] + [""]
        lines.append("Nearest other methods: angle between the gradients in degrees, log of the ratio of their norms")
        for name, near in self.neighbours().items():
            lines.append(f"  {name:<22}" + "".join(f"{n + f' {a:.1f} {s:+.2f}':<34}" for n, a, s in near).rstrip())
        if self.relations_on is not None:
            some, every = self.relations_on
            lines += [
                "",
                f"Equivalences were read on {some} of {every} tokens, spread over p_y; angles on all of them.",
            ]
        if self.left_out:
            lines += ["", f"Left out, because the tokens lack a field that they need: {', '.join(self.left_out)}"]
        return "\n".join(lines)


def distances(tokens: Tokens | None = None, *, progress: bool = True) -> Distances:
    r"""How the registered methods relate, computed from their gradients g = s (p - Q).

    Every method is taken at its defaults, at its presets and, one parameter at a time, at the ends and choices of its
    parameters. Gradients are compared rather than natural-scale targets, which are equal for all label-only methods. On a
    long text equivalences are read on some tokens, spread over p_y (``relations_on``), and angles on all of them.

    Args:
        tokens: N rows on which the gradients are taken; by default the built-in probes, which have every field.
        progress: show a bar on stderr while a long text is read.

    Returns:
        Distances: printable, with ``relations``, ``table``, ``angles()``, ``neighbours()`` and ``plot()``.

    Example:
        >>> any({"dft", "target_sft(eta=0.0)"} <= set(r.specs) for r in distances().relations)
        True
    """
    tokens = probes() if tokens is None else tokens
    long = tokens.logits.numel() > WHOLE
    some = tokens[rows_over_p(tokens, RELATED, ENTRIES)] if long else tokens
    relations: list[Relation] = []
    variants = [variant for method in methods().values() for variant in points(method)]
    for where, change in CIRCUMSTANCES.items():
        if where != "always" and any(getattr(some, name) is None for name in ("teacher", "reference", "old")):
            continue
        groups, repeated = _relations(_gradients(variants, change(some)), where)
        relations += [r for r in groups if not any(_covers(earlier, r) for earlier in relations)]
        if where == "always":  # equivalent without the condition too
            variants = [variant for variant in variants if variant.spec not in repeated]
    names, products = inner_products([method.variant() for method in methods().values()], tokens, progress and long)
    left_out = tuple(name for name in methods() if methods()[name].variant().spec not in names)
    relations.sort(key=lambda r: (list(CIRCUMSTANCES).index(r.where), KINDS.index(r.kind)))
    return Distances(relations, angle_table(names, products), left_out, (len(some), len(tokens)) if long else None)


def _gradients(variants: list[Variant], tokens: Tokens) -> dict[str, Float[Tensor, "N V"]]:
    """The gradient of every variant whose fields the tokens have, and of the yardsticks."""
    grads = {}
    for variant in variants:
        grad = method_gradient(variant, tokens)
        if grad is not None and float(grad.abs().max()) > NOTHING:
            grads[variant.spec] = grad.double()
    return grads | {name: implied_target(loss, tokens).grad.double() for name, loss in YARDSTICKS.items()}


def _relations(grads: dict[str, Tensor], where: str) -> tuple[list[Relation], set[str]]:
    """Groups of gradients that are equal, equal up to a factor or parallel on every token, each method at its simplest spec.

    Also the specs whose gradient equals that of a simpler one.
    """
    specs, g = list(grads), torch.stack(list(grads.values()))
    flat = g.flatten(1)
    size = flat.norm(dim=1)
    along = F.normalize(flat, dim=1)
    parallel = along @ along.T >= 1 - SAME**2
    same = parallel & ((size[:, None] / size).log().abs() <= SAME)
    rows = F.normalize(g, dim=2, eps=1e-300).transpose(0, 1)  # N, M, V
    nonzero = (g.norm(dim=2) > 1e-12 * g.norm(dim=2).amax(1, keepdim=True)).T  # N, M
    both_nonzero = nonzero[:, :, None] & nonzero[:, None]
    aligned = (rows @ rows.transpose(1, 2) >= 1 - 1e-10) | ~both_nonzero
    target = aligned.all(0) & both_nonzero.any(0)
    relations, remaining, repeated = [], set(specs), set()
    for kind, related in zip(KINDS, (same, parallel, target), strict=True):
        for group in _classes(related):
            sizes = {specs[i]: float(size[i]) for i in group if specs[i] in remaining}
            simplest = _simplest(sizes, apart=kind == KINDS[1])
            if len({params.parse(spec)[0] for spec in simplest}) > 1 or (len(simplest) > 1 and kind == KINDS[1]):
                relations.append(
                    Relation(kind, simplest, tuple(round(sizes[s] / sizes[simplest[0]], 6) for s in simplest), where)
                )
            if kind == KINDS[0] and simplest:
                repeated |= set(sizes) - {simplest[0]}
        remaining -= repeated  # listed once
        if kind == KINDS[1]:
            remaining = {spec for spec in specs if "(" not in spec}  # parameters that change a scale add nothing
    return relations, repeated


def _classes(related: Bool[Tensor, "M M"]) -> list[list[int]]:
    """Groups of indices that are all related to the group's first."""
    remaining, groups = list(range(len(related))), []
    while remaining:
        group = [i for i in remaining if i == remaining[0] or bool(related[remaining[0], i])]
        groups.append(group)
        remaining = [i for i in remaining if i not in group]
    return groups


def _simplest(sizes: dict[str, float], apart: bool) -> tuple[str, ...]:
    """One spec per method (and per norm, if ``apart``), the one with the fewest parameters; plain names first."""
    simplest: dict[tuple[str, float], str] = {}
    for spec in sorted(sizes, key=lambda s: (s.count("="), len(s))):
        size = float(f"{sizes[spec]:.6g}") if apart else 0.0
        simplest.setdefault((params.parse(spec)[0], size), spec)
    return tuple(sorted(simplest.values(), key=lambda s: ("(" in s, len(params.parse(s)[0]), s)))


def _covers(relation: Relation, other: Relation) -> bool:
    """Whether ``relation`` implies ``other``: it holds of the same methods and is at least as close."""
    return KINDS.index(relation.kind) <= KINDS.index(other.kind) and set(other.specs) <= set(relation.specs)
