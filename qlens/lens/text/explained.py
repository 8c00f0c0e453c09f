"""Explained text: a loss analysed on some tokens of a long text, and its findings confirmed on all of them."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.numerics import row_blocks, spread
from qlens.core.progress import track
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.lens.explanation import Explanation
from qlens.lens.gradient_analysis import GradientAnalysis
from qlens.lens.rounding import TOLERANCE
from qlens.lens.text.chunks import Comparison, TextRows
from qlens.lens.text.coverage import TextCoverage
from qlens.lens.text.sampling import rows_over_p
from qlens.lens.weights.weight_law import Law
from qlens.losses.user_code import quiet

ANALYSED, ENTRIES = 64, 2**22  # tokens that are analysed; fewer where their logits have more entries
TOGETHER = 2**20  # logits read at a time
ROUNDS = 3  # analyses, each with tokens on which the one before did not hold
ADDED = 16  # tokens added to an analysis
COMPARED = 3  # methods compared on all tokens: those that are printed

Analyse = Callable[[Tokens, Mapping[str, Tensor]], tuple[Explanation, GradientAnalysis | None]]


def explain_text(
    tokens: Tokens, residuals: Mapping[str, Tensor], analyse: Analyse, progress: bool
) -> Explanation | None:
    """The explanation of a loss on a long text, or None where its rows cannot be read one by one.

    The loss is analysed on some tokens, spread over p_y, as on a short text. Then it is read on all tokens, some rows at a
    time: methods and decomposition are compared there, weight functions are fitted to the weights of every token. Tokens on
    which something does not hold are added to the analysis, which is then repeated.

    Args:
        tokens: the text.
        residuals: a user's own distributions, (N, V) by name.
        analyse: the explanation of some tokens with its analysis.
        progress: show a bar on stderr.
    """
    rows, rounds = rows_over_p(tokens, ANALYSED, ENTRIES), 0
    while True:
        rounds += 1
        try:
            with quiet():
                e, analysis = analyse(tokens[rows], {name: probs[rows] for name, probs in residuals.items()})
                if analysis is None or not _by_rows(e, analysis):
                    return None
            comparison = _compared(e, analysis, tokens, residuals, progress)
        except InputError:  # it takes the whole text only, or a teacher in a closure does
            return None
        if rounds == ROUNDS or not len(comparison.exceptions):
            with quiet():
                return _completed(e, analysis, comparison, rows)
        added = comparison.exceptions[spread(len(comparison.exceptions), ADDED)]
        rows = torch.cat([rows, added.to(rows.device)]).unique()


def _compared(
    e: Explanation, analysis: GradientAnalysis, tokens: Tokens, residuals: Mapping[str, Tensor], progress: bool
) -> Comparison:
    """The findings on some tokens, compared on all."""
    simple = _by_parts(e)
    mixture, nearest, classes = (e.mixture, e.nearest[:COMPARED], e.class_weights) if simple else (None, [], None)
    terms, near = (
        (e.two_terms, e.near_match) if simple or (_nothing_removed(e) and not e.class_weights) else (None, None)
    )
    comparison = Comparison(e.variant, tokens, analysis.shown, mixture, nearest, classes, residuals, terms, near)
    blocks = list(row_blocks(len(tokens), tokens.logits.shape[1], TOGETHER))
    comparison.run(track(blocks, len(blocks), f"reading {len(tokens)} tokens", progress))
    return comparison


def _by_rows(e: Explanation, analysis: GradientAnalysis) -> bool:
    """Whether a token's gradient depends on that token alone, so that the text can be read some rows at a time."""
    token_alone = e.scope is not None and e.scope.of == "token" and not e.whole_batch
    return token_alone and not analysis.in_place and e.mixture is not None


def _by_parts(e: Explanation) -> bool:
    """Whether nothing but class weights was removed from the gradient, so that methods and parts can be compared."""
    equal = e.class_weights is None or e.class_weights.equal
    return _nothing_removed(e) and equal and e.mixture is not None and e.mixture.explains


def _nothing_removed(e: Explanation) -> bool:
    """Whether nothing, class weights aside, was removed from the gradient before methods were compared with it."""
    return all(one is None for one in (e.shift_variance, e.position_weights, e.batch_factor))


def _completed(e: Explanation, analysis: GradientAnalysis, comparison: Comparison, rows: Tensor) -> Explanation:
    """The explanation of all tokens."""
    tokens, figures = comparison.tokens, dict(comparison.figures)
    if float(e.losses.max() - e.losses.min()) <= TOLERANCE * float(e.losses.abs().max()):  # only the mean is known
        figures["loss"] = torch.full_like(figures["loss"], float(figures["loss"].double().mean()))
    whole = replace(
        e,
        tokens=tokens,
        target=Target.from_grad(tokens, comparison.grad),
        losses=figures["loss"],
        logits_dtype=tokens.logits.dtype,
    )
    compared = ("the sum of two terms",) if comparison.terms is not None else ()
    coverage = TextCoverage(
        rows.cpu(), len(tokens), figures, analysis.shown.inputs.logits.dtype, compared, comparison.exceptions,
        near=None if comparison.near is None else comparison.near_rows,
    )  # fmt: skip
    mixture = comparison.whole_mixture()
    if mixture is None or e.scope is None:
        assert e.mixture is not None
        return replace(whole, mixture=replace(e.mixture, index=rows.cpu()[e.mixture.index]), coverage=coverage)
    laws, remark = analysis.laws(mixture, TextRows(tokens, comparison.noise), analysis.further, e.scope)
    named = any(match.same for match in e.nearest) and not e.registered
    confirmed = (*(("the method",) if named else ()), *compared, "the decomposition", "its weights")
    excluded = {name: _excluded(law, mixture.parts[name], mixture.noise) for name, law in laws.items() if _has_end(law)}
    return replace(
        whole,
        nearest=[*comparison.nearest(), *e.nearest[COMPARED:]],
        mixture=mixture,
        laws=laws,
        other_vocabularies=remark,
        coverage=replace(coverage, confirmed=confirmed, excluded=excluded),
    )


def _has_end(law: Law | None) -> bool:
    """Whether a weight function has a threshold, a mask or a clip."""
    return law is not None and bool(law.where or {"at most", "at least"} & set(law.values))


def _excluded(law: Law | None, weights: Tensor, noise: Tensor | None) -> int:
    """The number of tokens beyond the threshold of a weight function, or at its clip."""
    assert law is not None
    slack = TOLERANCE * weights.abs() + (0.0 if noise is None else noise)
    if law.where:
        return int((weights.abs() <= slack).sum())
    ends = [value for name, value in law.values.items() if name in ("at most", "at least")]
    return int(sum(((weights - end).abs() <= TOLERANCE * abs(end) + slack) for end in ends).clamp(max=1).sum())
