"""Gradient analysis: everything that explain finds in the gradient of one loss, on the tokens shown and on trial tokens."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.lens.decompose.dependence import Scope, scope
from qlens.lens.decompose.label_offset import label_offset
from qlens.lens.decompose.mixture import Mixture
from qlens.lens.decompose.mixture_search import decompose, decompose_again
from qlens.lens.decompose.shift_variance import CLAMPED, ShiftVariance, shift_variance
from qlens.lens.decompose.unused_inputs import unused_inputs
from qlens.lens.decompose.vocabulary_factors import VocabularyFactor
from qlens.lens.decompose.weight_functions import Laws, compare_laws, laws_of
from qlens.lens.decompose.without_softmax import piecewise_linear, uncoupled
from qlens.lens.explanation import Explanation
from qlens.lens.identify.batch_factors import BatchFactor
from qlens.lens.identify.method_search import COMPARED, Identification, MethodSearch
from qlens.lens.implied import read
from qlens.lens.reading import Reading, fields_taken, models_taken, on_trials, requested_fields
from qlens.lens.rounding import TOLERANCE
from qlens.lens.weights.batch_gates import batch_gate
from qlens.lens.weights.batch_moments import batch_moments
from qlens.lens.weights.class_weights import ClassWeights, divided_by_mean, find_class_weights, with_usual_class
from qlens.lens.weights.positions import PositionWeights, unweighted
from qlens.lens.weights.thresholds import with_edges
from qlens.losses.layout.trial import holds_rows
from qlens.losses.notes.effective_tokens import fields_by_text, runs_another_model, standardises
from qlens.registry import Variant, methods

OPEN = 1e-9  # least 1 - p_y at which a label weight is read
IDS = 64  # label ids tested on tokens of a user's own
TRIAL_IDS = 160  # and on the trial tokens


def own_spec(variant: Variant) -> str:
    """The spec of a registered method, "" for any other loss, of the same name or not."""
    return variant.spec if methods().get(variant.name) is variant.method else ""


class GradientAnalysis(MethodSearch):
    """The analysis behind one explanation.

    Args:
        e: the explanation to be filled.
        shown: the reading on the tokens shown.
        residuals: a user's own distributions, (N, V) by name.
        original: the loss without casts replaced.
    """

    def __init__(self, e: Explanation, shown: Reading, residuals: Mapping[str, Tensor], original: Variant):
        super().__init__(e.variant, own_spec(e.variant), shown)
        self.e, self.residuals, self.original = e, residuals, original
        self.non_finite, self.class_weights_error = 0, ""
        self.fields = fields_taken(e.variant) if e.on_probes else None  # a closure may hold a user's own tokens
        self.further: Reading | None = None  # the trial tokens as weight functions are fitted on them
        self.unweighted: list[tuple[Reading, Tensor]] = []  # readings without position weights, and their rows
        trial = on_trials(self.variant, shown)
        self.trial, self.untried = (None, trial) if isinstance(trial, str) else (trial, "")

    def run(self) -> Explanation:
        """The explanation with everything that was found."""
        unused = unused_inputs(self.variant, self.base)
        if "weight" in unused:  # then no method is weighted either
            self.shown = self.shown.with_gradient(self.shown.grad, self.shown.inputs.unweighted())
            self.trial = self.trial and self.trial.with_gradient(self.trial.grad, self.trial.inputs.unweighted())
        classes = self.class_weights()
        reach = self.scope(classes)
        if self.e.whole_batch and reach.of == "token":  # the reduction depends on the batch in a way that was not seen
            reach = replace(reach, of="batch", through=(*reach.through, "number"))
        self.drop_non_finite_trials(reach)
        offset = 0
        if reach.of == "sequence" and reach.through == ("labels",):
            offset = label_offset(self.variant.loss, self.shown.inputs, self.shown.grad, self.shown.noise.rows)
        if classes is not None and reach.of != "token":
            classes = self.divided(classes, reach)
        if reach.of == "token" and not (classes or self.own_spec or self.e.whole_batch) and self.trial is not None:
            self.trial, self.numbers = with_edges(self.variant, self.trial)
        positions, rows = self.position_weights(reach) if classes is None else None, None
        per_token = reach.of == "token" or positions is not None or (classes is not None and classes.divided)
        shown, trial = (at and with_usual_class(self.variant, at, classes) for at in (self.shown, self.trial))
        assert shown is not None
        if positions is not None:
            shown, rows = self.unweighted[0]
            trial = self.unweighted[1][0] if len(self.unweighted) > 1 else None
        cause = self.cause(shown)
        trial_cause = None if trial is None else self.cause(trial)
        seen, trial = _without_cause(shown, cause), trial and _without_cause(trial, trial_cause)
        changed = not (cause is None and trial_cause is None and classes is None and positions is None)
        changed = changed or holds_rows(self.variant.method.fn, self.shown.inputs)  # then no rows can be read anew
        unknown = cause is not None and (bool(cause.uncoupled) or not cause.cause)
        unknown = unknown or (classes is not None and not classes.equal)
        common = dict(
            scope=reach,
            shift_variance=_clearer(cause, trial_cause),
            unused_inputs=unused,
            trial_tokens=None if self.trial is None else self.trial.inputs.with_precision(torch.float64),
            non_finite_trials=self.non_finite,
        )
        if not len(seen.inputs):  # every label shown is clamped
            identification = (
                self.identify(trial, None, changed, per_token, unknown)
                if trial is not None and len(trial.inputs)
                else None
            )
            return replace(self.e, nearest=identification.nearest if identification else [], **common)
        identification = self.identify(seen, trial, changed, per_token, unknown)
        gate, moments = self.batch_weights(identification, reach, per_token, changed)
        if (factor := identification.batch_factor) is not None:
            seen = self.without_batch_factor(seen, factor, factor.here)
            trial = trial and self.without_batch_factor(trial, factor, factor.wide or factor.here)
        here, there = self.with_models_taken(seen), trial and self.with_models_taken(trial)
        self.further = there
        mixture = decompose(here.grad, here.tokens, self.residuals, here.noise)
        laws, elsewhere = self.laws(mixture, here, there, reach)
        if reach.of == "batch" and not per_token and identification.batch_factor is None:
            laws, elsewhere = _without_clips(laws, elsewhere)
        if cause is not None:
            mixture = replace(mixture, index=cause.rows[mixture.index])
        if rows is not None:
            mixture = replace(mixture, index=rows[mixture.index])
        same = bool(identification.nearest) and identification.nearest[0].same
        near = identification.near_match
        if per_token and not same and self.two_terms is None:
            near = self.gated(seen, trial, mixture, laws, near)
        if near is not None and near.left and mixture.explains and laws and None not in laws.values():
            near = None  # the weight functions describe the loss on all tokens
        factors = min(self.vocabulary_factors, key=VocabularyFactor.order, default=None)
        return replace(
            self.e,
            nearest=identification.nearest,
            mixture=mixture,
            laws=laws,
            class_weights=classes,
            class_weights_error=self.class_weights_error,
            label_offset=offset,
            piecewise_linear=piecewise_linear(self.variant, self.shown),
            near_match=near,
            by_vocabulary=None if same else factors,
            other_vocabularies=elsewhere,
            batch_factor=identification.batch_factor,
            position_weights=positions,
            batch_gate=gate,
            batch_moments=moments,
            two_terms=self.two_terms,
            **common,
        )

    @cached_property
    def in_place(self) -> str:
        """Why the loss has inputs of its own that stay in place as tokens move; "" where it has none."""
        fn, params, tokens = self.variant.method.fn, self.variant.params, self.shown.inputs
        if self.variant.derived and runs_another_model(fn, params, tokens):
            return "runs another model, whose inputs are made up"
        return "holds values of its own for these tokens" if holds_rows(fn, tokens) else ""

    @property
    def base(self) -> Reading:
        """The trial tokens if there are any, else those shown."""
        return self.shown if self.trial is None else self.trial

    def drop_non_finite_trials(self, reach: Scope) -> None:
        """Leave out trial tokens whose gradient is not finite; all of them where tokens depend on each other."""
        if self.trial is None:
            return
        finite = self.trial.grad.isfinite().all(-1)
        if self.original is not self.variant:
            finite &= read(self.original, self.trial.inputs, self.original.loss).isfinite().all(-1)
        if not bool(finite.all()):
            self.non_finite = int((~finite).sum())
            self.trial = self.trial[finite] if reach.of == "token" else None

    def cause(self, at: Reading) -> ShiftVariance | None:
        """Why the rows of a gradient do not sum to zero, where they do not."""
        return uncoupled(self.variant, at, shift_variance(at.grad, at.tokens, at.noise))

    def with_models_taken(self, at: Reading) -> Reading:
        """The reading without the other models that the loss does not take."""
        return at.with_gradient(at.grad, models_taken(self.variant, at.inputs))

    def scope(self, classes: ClassWeights | None = None) -> Scope:
        """What a token's gradient depends on, tested on the probes or trial tokens, else on some of those shown."""
        at = self.shown if self.e.on_probes else self.base
        most = max(48, COMPARED // at.inputs.logits.shape[1])
        some = at.inputs if len(at.inputs) <= most else at.inputs[:most]
        return scope(
            self.variant.loss,
            some,
            TOLERANCE,
            requested_fields(self.variant),
            at.arithmetic,
            classes.weights if classes else None,
            self.variant.total,
            self.fields_of_texts(some),
            self.in_place,
        )

    def fields_of_texts(self, tokens: Tokens) -> tuple[str, ...]:
        """The fields with one value per text that affects no other text."""
        if not self.variant.derived:
            return ()
        fn, params = self.variant.method.fn, self.variant.params
        fields = fields_by_text(fn, params, tokens)
        shared = "advantage" in fields and standardises(fn, params, tokens)
        return tuple(name for name in fields if name != "advantage" or not shared)

    def class_weights(self) -> ClassWeights | None:
        """The loss's weights by label id: of every id of the trial tokens, else of the ids among a user's own labels."""
        if self.variant.compares_pairs or self.in_place:
            return None
        weights = self._class_weights(self.base, list(range(min(self.base.inputs.logits.shape[1], TRIAL_IDS))))
        if weights is None and not (self.e.on_probes or self.own_spec) and self.trial is not None:
            weights = self._class_weights(self.shown, self.shown.inputs.labels.unique().tolist()[:IDS])
        return weights

    def _class_weights(self, at: Reading, ids: list[int]) -> ClassWeights | None:
        try:
            return find_class_weights(self.variant, at, ids)
        except InputError as error:
            self.class_weights_error = str(error)
            return None

    def position_weights(self, reach: Scope) -> PositionWeights | None:
        """The loss's weights by position, where a token depends on nothing else of other tokens; fills ``unweighted``."""
        others = set(reach.through) - {"position", "number"}
        if "position" not in reach.through or others or self.variant.compares_pairs:
            return None
        readings = [self.shown, *([self.trial] if self.trial is not None else [])]
        weights, self.unweighted = unweighted(self.variant, readings)
        return weights

    def divided(self, classes: ClassWeights, reach: Scope) -> ClassWeights | None:
        """Class weights of a loss that depends on its batch, as divided by the batch's mean weight; else None."""
        if not classes.equal or "labels" not in reach.through:
            return None
        return divided_by_mean(classes, self.variant.loss, self.base.inputs, self.base.arithmetic)

    def batch_weights(self, identification: Identification, reach: Scope, per_token: bool, changed: bool) -> tuple:
        """The batch gate, or else the batch moments, of a loss that depends on its batch and is no known method."""
        same = bool(identification.nearest) and identification.nearest[0].same
        named = self.own_spec or self.two_terms is not None or same
        if (
            reach.of != "batch"
            or per_token
            or changed
            or identification.batch_factor
            or named
            or self.variant.compares_pairs
        ):
            return None, None
        gate = batch_gate(self.shown, self.other_batches, identification.nearest)
        return gate, None if gate is not None else batch_moments(self.shown, self.other_batches)

    def without_batch_factor(self, at: Reading, factor: BatchFactor, value: float) -> Reading:
        """The reading divided by the factor that its batch has beside the constant one.

        Weights of no method are divided by the factor of their weight function, or scaled to a largest of 1.
        """
        if factor.spec:
            return at.with_gradient(at.grad * (factor.constant / value))
        known = self.with_models_taken(at)
        law = laws_of(decompose(known.grad, known.tokens, {}, known.noise), known).get("the label")
        rest = at.tokens.rest_log_probs.exp()
        largest = (-at.tokens.gather(at.grad) / rest)[rest > OPEN].abs()
        scale = law.values.get("c") if law is not None else float(largest.max()) if len(largest) else None
        return at.with_gradient(at.grad / scale) if scale else at

    def laws(self, mixture: Mixture, seen: Reading, trial: Reading | None, reach: Scope) -> tuple[Laws, str]:
        """The weight function of every part, fitted on the trial tokens too where their parts are the same; a remark on that."""
        if trial is None:
            return laws_of(mixture, seen), self.untried
        wide = decompose_again(mixture, trial.grad, trial.tokens, trial.noise)
        return compare_laws(mixture, seen, wide, trial, reach.of)


def _without_cause(at: Reading, variance: ShiftVariance | None) -> Reading:
    """A reading with the cause of its shift-variance removed, if that is known."""
    if variance is None or not variance.cause:
        return at
    return at[variance.rows.to(at.inputs.logits.device)].with_gradient(variance.grad, variance.tokens)


def _clearer(variance: ShiftVariance | None, wide: ShiftVariance | None) -> ShiftVariance | None:
    """The cause on the tokens shown; of clamped logits that on the trial tokens, whose logits reach further."""
    both = variance is not None and wide is not None and all(one.cause.startswith(CLAMPED) for one in (variance, wide))
    return wide if both else variance or wide


def _without_clips(laws: Laws, elsewhere: str) -> tuple[Laws, str]:
    """Weight functions without those that are clipped at the largest or smallest weight of this batch alone."""
    clipped = [name for name, law in laws.items() if law and {"at most", "at least"} & set(law.values)]
    laws = {name: None if name in clipped else law for name, law in laws.items()}
    if any(law is None for law in laws.values()) and elsewhere.startswith("the same at"):
        where = elsewhere.removeprefix("the same ").rstrip(".")
        elsewhere = f"the same parts {where}; not all of their weights have a known formula."
    return laws, elsewhere
