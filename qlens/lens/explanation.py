"""Explanation: what a loss teaches, token by token and in words, to print, plot and hand on."""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch

from qlens.core.errors import InputError
from qlens.core.probes import shapes
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.lens import summary, wording
from qlens.lens.decompose.dependence import Scope
from qlens.lens.decompose.mixture import Mixture
from qlens.lens.decompose.raw_logits import Leak
from qlens.lens.decompose.vocabulary_factors import VocabularyFactor
from qlens.lens.exact import OwnPrecision
from qlens.lens.gradient_flow import Destination, destination
from qlens.lens.identify import matching
from qlens.lens.identify.batch_statistics import Normalised
from qlens.lens.identify.near_identity import Nearly
from qlens.lens.identify.two_terms import TwoTerms
from qlens.lens.weights.batch_gates import BatchGate
from qlens.lens.weights.centred import Centred
from qlens.lens.weights.label_weights import LabelWeights
from qlens.lens.weights.positions import PositionWeights
from qlens.lens.weights.weight_law import Law
from qlens.losses.user_code import first_line, quiet
from qlens.registry.variant import Variant

FOLLOWED = (4, 12, 32)  # vocabularies on which training is followed, the first that the loss takes
SHORT = ("WARNING", "Mixture", "  pull")  # how the findings begin that are printed unless all are asked for
TELLING = (0.001, 0.1, 0.5, 0.9, 0.999)  # the label probabilities shown first


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a loss teaches on some tokens: print it, or read ``summary``, ``table``, ``nearest``, ``law``, ``plot()`` and so on.

    Args:
        variant: the loss.
        tokens: where it was read.
        target: the implied target, unit scale.
        losses: the unreduced values in nats, (N,).
        nearest: registered methods, nearest first.
        pieces: turns a token id into its text; None on the probes.
        mixture: the pulls toward named distributions that make up its gradient.
        laws: the formula that each pull follows, by the name of its distribution.
        scope: what a token's gradient depends on.
        leak: why sum(Q) is not 1, where it is not.
        elsewhere: whether another vocabulary reads the same.
        written: which of its inputs the loss writes on.
        on_probes: whether the tokens are the built-in probes.
        precision: of the gradient that was read.
        own: what the loss itself computes in, where it was read in float64 instead; None where it was read as it is.
        stored: the dtype of the logits as a user gave them; None on the probes.
        registered: whether the loss is a registered method, at these parameters.
        silent: whether its gradient is zero up to rounding.
        label_weights: how it weighs tokens by the id of their label, where it does.
        shifted: how many places after its own the label stands that a token is trained on; 0 for its own.
        linear: whether its gradient stays as it is when the logits move a little: there is no softmax in it.
        nearly: the method that it is on most tokens, where it is none on all.
        by_vocabulary: the method that it is times a factor of the vocabulary's size, where it is.
        whole: why the loss is read as a whole batch, its reduction left as it is; "" where it is undone.
        unused: fields that it asks for and that change nothing.
        tried: the wider trial tokens on which it was read too.
        broken: on how many of these its gradient is not finite.
        ids_untried: why label ids could not be tried, where that failed.
        normalised: the method that it is times a factor of the batch, where it is.
        position_weights: how it weighs tokens by their place, where it does.
        centred: the mean and spread of cross-entropies that it is, where it is.
        gate: which tokens of a batch count by how they compare with the rest of it, where some do.
        two_terms: the two terms that add up to it, where it is no registered method.
    """

    variant: Variant
    tokens: Tokens
    target: Target
    losses: torch.Tensor
    nearest: list[matching.Match]
    pieces: Callable[[int], str] | None = None
    mixture: Mixture | None = None
    laws: Mapping[str, Law | None] = field(default_factory=dict)
    scope: Scope | None = None
    leak: Leak | None = None
    elsewhere: str = ""
    written: tuple[str, ...] = ()
    on_probes: bool = False
    precision: torch.dtype = torch.float64
    own: OwnPrecision | None = None
    stored: torch.dtype | None = None
    registered: bool = False
    silent: bool = False
    label_weights: LabelWeights | None = None
    shifted: int = 0
    linear: bool = False
    nearly: Nearly | None = None
    by_vocabulary: VocabularyFactor | None = None
    whole: str = ""
    unused: tuple[str, ...] = ()
    tried: Tokens | None = None
    broken: int = 0
    ids_untried: str = ""
    normalised: Normalised | None = None
    position_weights: PositionWeights | None = None
    gate: BatchGate | None = None
    centred: Centred | None = None
    two_terms: TwoTerms | None = None

    @property
    def spec(self) -> str:
        """The loss, as it was named."""
        return self.variant.spec

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row per token: p_y, loss, trust, reshape, Q of the label and of its strongest rival, off-simplex mass, gradients."""
        t, y = self.target, self.tokens.labels[:, None].long()
        p = t.probs
        rival = p.scatter(1, y, -1).argmax(-1, keepdim=True)
        columns = {
            "p_y": p.gather(1, y)[:, 0],
            "p_rival": p.gather(1, rival)[:, 0],
            "loss": self.losses,
            "trust": t.label_weight,
            "reshape": t.reshape,
            "q_label": t.q.gather(1, y)[:, 0],
            "q_rest": t.q.gather(1, rival)[:, 0],
            "negative_mass": t.negative_mass,
            "total": t.total,
            "label_grad": t.grad.gather(1, y)[:, 0],
            "other_grad": t.grad.gather(1, rival)[:, 0],
        }
        frame = pd.DataFrame({name: value.detach().double().cpu().numpy() for name, value in columns.items()})
        name = self.pieces or str
        frame.insert(0, "label", [name(int(i)) for i in y[:, 0]])
        frame.insert(1, "rival", [name(int(i)) for i in rival[:, 0]])
        frame.insert(2, "shape", shapes() if self.on_probes and len(frame) == len(shapes()) else "text")
        return frame

    @cached_property
    def findings(self) -> list[str]:
        """What a reader should know, in words, warnings first."""
        return wording.lines(self)

    @cached_property
    def called_as(self) -> str:
        """How the loss was called, in words."""
        with quiet():
            return self.variant.account(self.tokens).called_as

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the loss does beside its gradient on these rows: another model run, an input without effect, ..."""
        with quiet():
            return self.variant.account(self.tokens).notes

    @cached_property
    def summary(self) -> str:
        """A paragraph that a person would say about this loss."""
        ends = self.destination.sentence if isinstance(self.destination, Destination) else ""
        return " ".join(filter(None, [summary.paragraph(self), ends]))

    @property
    def law(self) -> Law | None:
        """The formula that the label's pull follows across tokens; None where none of the known ones does."""
        return self.laws.get("the label")

    @property
    def residual(self) -> str:
        """Where the probability goes that the label does not get."""
        if self.mixture is None or not self.mixture.explains:
            return "no mixture of known distributions"
        return " and ".join(name for name in self.mixture.parts if name != "the label") or "the student"

    @cached_property
    def destination(self) -> Destination | str:
        """Where training on it ends, or why that is not known."""
        if self.silent or not bool(self.target.grad.isfinite().all() and self.target.grad.any()):
            return "its gradient leads nowhere"
        if self.position_weights is not None:
            return "a token's position changes its gradient, and with it where training ends"
        if self.scope is not None and self.scope.of != "token":
            return f"its gradient depends on the {self.scope.of}, not on one token alone"
        if self.label_weights is not None:
            return "which ids the labels have changes its gradient, and with it where training ends"
        sizes = dict.fromkeys(min(size, self.tokens.logits.shape[1]) for size in FOLLOWED)
        failed = ""
        for size in sizes:
            try:
                with quiet():
                    return destination(self.variant, size=size)
            except InputError as error:
                cause = error.__cause__
                said = str(error) if cause is None else f"{type(cause).__name__}: {first_line(cause)}"
                failed = failed or said.removesuffix(": (no message)")
        tried = ", ".join(map(str, sizes))
        return f"not known, because the loss fails where it was followed, on vocabularies of {tried} ({failed})"

    @property
    def telling(self) -> pd.DataFrame:
        """The rows of ``table`` nearest to telling label probabilities."""
        frame = self.table[self.table["shape"] != "flat"]
        rows = [(frame["p_y"] - wanted).abs().idxmin() for wanted in TELLING]
        return frame.loc[list(dict.fromkeys(rows))]

    def plot(self) -> Any:
        """The figure: gradients, targets and trust against p_y (matplotlib)."""
        from qlens.analysis.plots import figure_explain

        return figure_explain(self)

    def to_latex(self) -> str:
        """The table as LaTeX (booktabs)."""
        shown = self.telling[["p_y", "trust", "q_label", "p_rival", "q_rest", "negative_mass"]]
        names = ["$p_y$", "trust", "$Q_y$", "$p_{rival}$", "$Q_{rival}$", "off simplex"]
        return shown.set_axis(names, axis=1).to_latex(index=False, float_format="%.4f")

    def to_dict(self) -> dict[str, Any]:
        """Everything printable, for JSON."""
        m = self.mixture
        return {
            "loss": self.spec,
            "tokens": len(self.tokens),
            "vocabulary": self.tokens.logits.shape[1],
            "summary": self.summary,
            "findings": self.findings,
            "called_as": self.called_as,
            "notes": list(self.notes),
            "nearest": [vars(match) for match in self.nearest],
            "mixture": m and {
                "explains": m.explains, "signed": m.signed, "misfit": m.misfit, "held": m.held, "parameter": m.parameter,
                "closest": m.closest, "parts": {name: pull.tolist() for name, pull in m.parts.items()},
                "unique": m.unique.tolist(), "tokens": m.index.tolist(),
            },
            "laws": {name: law and vars(law) for name, law in self.laws.items()},
            "scope": self.scope and vars(self.scope),
            "label_weights": self.label_weights and {"weights": self.label_weights.weights, "equal": self.label_weights.equal,
                                                     "divided": self.label_weights.divided},
            "normalised": self.normalised and vars(self.normalised),
            "position_weights": self.position_weights and vars(self.position_weights),
            "gate": self.gate and vars(self.gate),
            "centred": self.centred and vars(self.centred),
            "two_terms": self.two_terms and vars(self.two_terms),
            "nearly": self.nearly and vars(self.nearly),
            "by_vocabulary": self.by_vocabulary and vars(self.by_vocabulary),
            "whole": self.whole,
            "unused": list(self.unused),
            "precision": str(self.computes_in).removeprefix("torch."),
            "leak": self.leak and {"cause": self.leak.cause, "value": self.leak.value},
            "destination": self.destination if isinstance(self.destination, str) else self.destination.to_dict(),
            "table": self.table.to_dict("records"),
        }  # fmt: skip

    @property
    def computes_in(self) -> torch.dtype:
        """The coarsest type that the loss itself computes in."""
        return self.precision if self.own is None else self.own.dtype

    @property
    def read_in(self) -> str:
        """The precision of the reading, of the logits given and of the loss, as far as they differ."""
        used, stored, own = (
            str(d).removeprefix("torch.") for d in (self.tokens.logits.dtype, self.stored, self.computes_in)
        )
        said = used if self.stored in (None, self.tokens.logits.dtype) else f"read in {used}; logits {stored}"
        coarse = torch.finfo(self.computes_in).eps > torch.finfo(self.tokens.logits.dtype).eps
        return f"{said}; the loss computes in {own}" if coarse else said

    def __str__(self) -> str:
        return self.text()

    def text(self, full: bool = False) -> str:
        """The explanation for reading: the answer, a table, warnings, the mixture and the nearest methods.

        Args:
            full: adds the label weights, the simplex, the scope, what was tried and where training ends.

        Example:
            >>> import qlens
            >>> len(qlens.explain("dft").text().splitlines()) < 30
            True
        """
        n, v = self.tokens.logits.shape
        where = "built-in probes" if self.on_probes else "tokens"
        shown = self.telling[["label", "p_y", "trust", "q_label", "rival", "p_rival", "q_rest", "negative_mass"]]
        shown = shown.rename(columns={"q_label": "Q(label)", "p_rival": "p(rival)", "q_rest": "Q(rival)"})
        shown = shown.rename(columns={"negative_mass": "off simplex"})
        if self.pieces is None:
            shown = shown.drop(columns=["label", "rival"])
        lines = [f"{self.spec}: the target it trains toward, Q = p - g ({n} {where}, V = {v}, {self.read_in})", ""]
        lines += [textwrap.fill(self.summary, 110, break_on_hyphens=False), ""]
        lines += [shown.to_string(index=False, float_format=lambda x: f"{x:.4f}"), ""]
        called = [f"Called with {self.called_as}."] if self.called_as else []
        ends = [f"Ends: {getattr(self.destination, 'sentence', self.destination)}"] if full else []
        findings = [line for line in self.findings if full or line.startswith(SHORT)]
        said = [*findings, *self.notes, *called, *ends]
        lines += [textwrap.fill(line, 110, subsequent_indent="    ", break_on_hyphens=False) for line in said]
        if self.nearest:
            lines += ["Nearest methods:", *(f"  {match}" for match in self.nearest[:3])]
        return "\n".join(lines)
