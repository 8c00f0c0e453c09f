"""Explanation: the implied target of a loss on some tokens, with everything that its gradient shows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch

from qlens.core.deprecation import warn
from qlens.core.deprecation.columns import renamed_columns
from qlens.core.display import Result
from qlens.core.errors import InputError
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.lens.decompose.dependence import Scope
from qlens.lens.decompose.mixture import Mixture
from qlens.lens.decompose.shift_variance import ShiftVariance
from qlens.lens.decompose.vocabulary_factors import VocabularyFactor
from qlens.lens.describe import findings, screen, summary
from qlens.lens.exact import OwnPrecision
from qlens.lens.gradient_flow import Destination, destination
from qlens.lens.identify import matching
from qlens.lens.identify.batch_factors import BatchFactor
from qlens.lens.identify.near_identity import NearMatch
from qlens.lens.identify.two_terms import TwoTerms
from qlens.lens.text.coverage import TextCoverage
from qlens.lens.text.figures import Figures, token_figures
from qlens.lens.weights.batch_gates import BatchGate
from qlens.lens.weights.batch_moments import BatchMoments
from qlens.lens.weights.class_weights import ClassWeights
from qlens.lens.weights.positions import PositionWeights
from qlens.lens.weights.weight_law import Law
from qlens.losses.notes.account import Account
from qlens.losses.user_code import first_line, quiet
from qlens.registry.variant import Variant

VOCABULARIES = (4, 12, 32)  # on which training is followed: the first that the loss takes
REPRESENTATIVE = (0.001, 0.1, 0.5, 0.9, 0.999)  # label probabilities of the rows that are printed
OLD_NAMES = {
    "label_weights": "class_weights",
    "leak": "shift_variance",
    "elsewhere": "other_vocabularies",
    "written": "modified_inputs",
    "own": "own_precision",
    "stored": "logits_dtype",
    "silent": "zero_gradient",
    "shifted": "label_offset",
    "linear": "piecewise_linear",
    "nearly": "near_match",
    "whole": "whole_batch",
    "unused": "unused_inputs",
    "tried": "trial_tokens",
    "broken": "non_finite_trials",
    "ids_untried": "class_weights_error",
    "normalised": "batch_factor",
    "centred": "batch_moments",
    "gate": "batch_gate",
    "pieces": "token_text",
    "telling": "representative",
}


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(Result):
    """What a loss teaches on some tokens: print it, or read ``summary``, ``table``, ``nearest``, ``law``, ``plot()`` and so on.

    Args:
        variant: the loss.
        tokens: where it was read, N rows.
        target: the implied target, unit scale.
        losses: the unreduced values in nats, (N,).
        nearest: registered methods, nearest first.
        token_text: function from a token id to its text; None on the probes.
        mixture: the decomposition of the gradient into named distributions.
        laws: the weight function of every part of the decomposition, by the name of its distribution.
        scope: what a token's gradient depends on.
        shift_variance: why sum(Q) is not 1, where it is not.
        other_vocabularies: whether the findings hold at another vocabulary, in words.
        modified_inputs: the arguments that the loss modifies in place.
        on_probes: whether the tokens are the built-in probes.
        precision: of the gradient that was read.
        own_precision: the loss's own dtype and its effect, where the loss was read in float64 instead.
        logits_dtype: dtype of the logits given; None on the probes.
        registered: whether the loss is a registered method.
        zero_gradient: whether its gradient is zero up to rounding.
        class_weights: its weights by label id.
        label_offset: places between a token's label and the label that it is trained on; 0 if they are the same.
        piecewise_linear: whether small changes of the logits leave the gradient as it is.
        near_match: the method whose gradient it has on most tokens.
        by_vocabulary: the method whose gradient it has times a factor of the vocabulary's size.
        whole_batch: why the loss is read as a whole batch, its reduction left as it is; "" where the reduction is undone.
        unused_inputs: fields that it asks for and that have no effect.
        trial_tokens: the wider tokens on which it was read as well.
        non_finite_trials: number of these on which its gradient is not finite.
        class_weights_error: why class weights could not be tested.
        batch_factor: the method whose gradient it has times a factor of the batch.
        position_weights: its weights by position.
        batch_moments: the mean and spread of cross-entropies that it is.
        batch_gate: the gate that compares a token with its batch.
        two_terms: the two terms that add up to it.
        coverage: what of a long text was analysed and confirmed.

    Example:
        >>> from qlens.lens.explain import explain
        >>> explain("dft")
        Explanation(dft on 57 tokens, V = 32: registered)
    """

    variant: Variant
    tokens: Tokens
    target: Target
    losses: torch.Tensor
    nearest: list[matching.Match]
    token_text: Callable[[int], str] | None = None
    mixture: Mixture | None = None
    laws: Mapping[str, Law | None] = field(default_factory=dict)
    scope: Scope | None = None
    shift_variance: ShiftVariance | None = None
    other_vocabularies: str = ""
    modified_inputs: tuple[str, ...] = ()
    on_probes: bool = False
    precision: torch.dtype = torch.float64
    own_precision: OwnPrecision | None = None
    logits_dtype: torch.dtype | None = None
    registered: bool = False
    zero_gradient: bool = False
    class_weights: ClassWeights | None = None
    label_offset: int = 0
    piecewise_linear: bool = False
    near_match: NearMatch | None = None
    by_vocabulary: VocabularyFactor | None = None
    whole_batch: str = ""
    unused_inputs: tuple[str, ...] = ()
    trial_tokens: Tokens | None = None
    non_finite_trials: int = 0
    class_weights_error: str = ""
    batch_factor: BatchFactor | None = None
    position_weights: PositionWeights | None = None
    batch_gate: BatchGate | None = None
    batch_moments: BatchMoments | None = None
    two_terms: TwoTerms | None = None
    coverage: TextCoverage | None = None

    def __getattr__(self, name: str) -> Any:
        if name not in OLD_NAMES:
            raise AttributeError(f"'Explanation' has no attribute {name!r}")
        warn(f"Explanation.{name}", f"Explanation.{OLD_NAMES[name]}")
        return getattr(self, OLD_NAMES[name])

    @property
    def spec(self) -> str:
        """The loss, as it was named."""
        return self.variant.spec

    @property
    def read_dtype(self) -> torch.dtype:
        """The dtype of the logits on which the loss was read."""
        return self.tokens.logits.dtype if self.coverage is None else self.coverage.dtype

    @cached_property
    def figures(self) -> Figures:
        """The figures of every token by name, (N,)."""
        return token_figures(self.target, self.tokens, self.losses) if self.coverage is None else self.coverage.figures

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row per token: p_y, loss, label_weight, reshape, Q of label and runner-up, negative mass, gradients."""
        return renamed_columns(screen.frame(self))

    @cached_property
    def findings(self) -> list[str]:
        """The findings, a line each, warnings first."""
        return findings.lines(self)

    @cached_property
    def called_as(self) -> str:
        """How the loss was called, in words; "" for a method with a target of its own."""
        return self._account.called_as

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the loss besides its gradient: another model that it runs, an input without effect, ..."""
        return self._account.notes

    @cached_property
    def _account(self) -> Account:
        if not self.variant.derived:
            return Account("", ())
        with quiet():
            return self.variant.account(self.tokens if self.coverage is None else self.tokens[self.coverage.rows])

    @cached_property
    def summary(self) -> str:
        """One paragraph: the method, the label's coefficient, the residual, the fixed point."""
        fixed_point = self.destination.sentence if isinstance(self.destination, Destination) else ""
        return " ".join(filter(None, [summary.paragraph(self), fixed_point]))

    @property
    def law(self) -> Law | None:
        """The weight function of the label across tokens; None where no known one fits."""
        return self.laws.get("the label")

    @property
    def residual(self) -> str:
        """The distributions that get the probability which the label does not get."""
        if self.mixture is None or not self.mixture.explains:
            return "no mixture of known distributions"
        return " and ".join(name for name in self.mixture.parts if name != "the label") or "the student"

    @cached_property
    def destination(self) -> Destination | str:
        """The fixed point of training on this loss, or why it is not known."""
        size = self.figures["grad_norm"]
        if self.zero_gradient or not bool(size.isfinite().all() and size.any()):
            return "the gradient is zero or not finite"
        if self.position_weights is not None:
            return "a token's position changes its gradient, and with it the fixed point"
        if self.scope is not None and self.scope.of != "token":
            return f"its gradient depends on the {self.scope.of}, not on one token alone"
        if self.class_weights is not None:
            return "which ids the labels have changes its gradient, and with it the fixed point"
        sizes = dict.fromkeys(min(size, self.tokens.logits.shape[1]) for size in VOCABULARIES)
        reason = ""
        for size in sizes:
            try:
                with quiet():
                    return destination(self.variant, size=size)
            except InputError as error:
                cause = error.__cause__
                message = str(error) if cause is None else f"{type(cause).__name__}: {first_line(cause)}"
                reason = reason or message.removesuffix(": (no message)")
        tried = ", ".join(map(str, sizes))
        return f"not known, because the loss fails where it was followed, on vocabularies of {tried} ({reason})"

    @property
    def representative(self) -> pd.DataFrame:
        """The rows of ``table`` nearest to p_y = 0.001, 0.1, 0.5, 0.9 and 0.999."""
        frame = self.table[self.table["shape"] != "flat"]
        rows = [(frame["p_y"] - wanted).abs().idxmin() for wanted in REPRESENTATIVE]
        return frame.loc[list(dict.fromkeys(rows))]

    @property
    def computes_in(self) -> torch.dtype:
        """The coarsest dtype that the loss itself computes in."""
        return self.precision if self.own_precision is None else self.own_precision.dtype

    @property
    def read_in(self) -> str:
        """The dtype of the reading, of the given logits and of the loss, as far as they differ."""
        return screen.precision(self)

    def plot(self) -> Any:
        """The figure: gradients, targets and label weights against p_y (matplotlib)."""
        from qlens.analysis.plots import figure_explain

        return figure_explain(self)

    def to_frame(self) -> pd.DataFrame:
        """``table``: a row per token."""
        return self.table

    def to_latex(
        self, columns: Sequence[str] | None = None, caption: str | None = None, label: str | None = None, **options: Any
    ) -> str:
        """The representative rows in LaTeX (booktabs).

        Args:
            columns: columns of ``table``; by default p_y, label weight, Q of label and runner-up, negative mass.
            caption, label, options: as of ``qlens.core.display.latex_table``.
        """
        return screen.latex(self, columns, caption, label, **options)

    def to_dict(self) -> dict[str, Any]:
        """Everything printable, for JSON."""
        return screen.plain(self)

    def text(self, full: bool = False) -> str:
        """The explanation for reading: the summary, a table, warnings, the decomposition and the nearest methods.

        Args:
            full: adds the label's coefficient, the simplex, the scope, the range covered and the fixed point.

        Example:
            >>> import qlens
            >>> len(qlens.explain("dft").text().splitlines()) < 30
            True
        """
        return screen.text(self, full)

    def __repr__(self) -> str:
        n, v = self.tokens.logits.shape
        best = self.nearest[0] if self.nearest else None
        times = "" if best is None or best.factor == 1 else f" times {best.factor:.4g}"
        if self.registered:
            near = "registered"
        elif best is None:
            near = "no method to compare"
        elif best.same:
            near = f"the same gradient as {best.spec}{times}"
        else:
            near = f"nearest method {best.spec}, {best.angle:.0f} degrees away"
        return f"Explanation({self.spec} on {n} tokens, V = {v}: {near})"

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return screen.html(self)
