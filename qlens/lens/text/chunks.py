"""Chunks: a loss read on a long text some rows at a time, and what was found on a few of its rows compared on all of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.core.autograd import gradient, value_and_gradient
from qlens.core.numerics import precision, release_memory
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.lens.decompose.mixture import Mixture
from qlens.lens.decompose.part_weights import PartWeights, weights_of_parts
from qlens.lens.identify import matching
from qlens.lens.identify.matching import RELATIONS, Match, method_gradient
from qlens.lens.identify.near_identity import NearMatch
from qlens.lens.identify.two_terms import TwoTerms
from qlens.lens.reading import Reading, models_taken, prepared
from qlens.lens.rounding import Noise, moves, rounding
from qlens.lens.text.figures import Figures, joined, token_figures
from qlens.lens.weights.class_weights import ClassWeights
from qlens.lens.weights.features import TokenFeatures
from qlens.losses.user_code import quiet
from qlens.registry import get
from qlens.registry.variant import Variant

RELEASED = 10  # chunks after which freed memory is returned to the system
MISFIT = 1e-5  # relative misfit of a row beyond which a decomposition does not hold there


def read_chunk(variant: Variant, tokens: Tokens, shown: Reading) -> Reading:
    """The reading of a few rows, in the precision of an earlier reading of the same loss.

    Args:
        variant: the loss, whose gradient at a token depends on that token alone.
        tokens: the rows.
        shown: the earlier reading.
    """
    inputs = prepared(variant, tokens.with_precision(shown.inputs.logits.dtype))
    losses, grad = value_and_gradient(variant.loss, inputs)
    moved = [gradient(variant.loss, other) for other in moves(inputs, shown.arithmetic, 1)]
    noise = rounding(grad, inputs, shown.arithmetic, moved, shown.own)
    return replace(shown, inputs=inputs, grad=grad.double(), noise=noise, losses=losses)


@dataclass
class _MatchSums:
    """The comparison of a gradient g with that of a method, summed over chunks."""

    match: Match
    dot: float = 0.0
    squares: float = 0.0
    own_squares: float = 0.0
    apart: int = 0

    def add(self, at: Reading) -> Bool[Tensor, " n"] | None:
        """Add a chunk; the rows on which g is not the method's gradient times the factor, where it is said to be."""
        other = method_gradient(get(self.match.spec), at.tokens)
        if other is None:
            return None
        g, m = at.grad, other.double()
        self.dot += float((g * m).sum())
        self.squares, self.own_squares = (
            self.squares + float(m.square().sum()),
            self.own_squares + float(g.square().sum()),
        )
        if not self.match.same:
            return None
        apart = matching.distance_at(g, m, self.match.factor, at.noise) > 1
        self.apart += int(apart.sum())
        return apart

    def result(self, number: int) -> Match:
        """The match on all tokens."""
        size = (self.squares * self.own_squares) ** 0.5
        if (self.match.same and not self.apart) or not size:
            return self.match
        angle, factor = matching.angle_of(self.dot / size), self.dot / self.squares
        misfit = max(1 - self.dot**2 / size**2, 0.0) ** 0.5
        share = 1 - self.apart / number if self.match.same else self.match.share
        kind = RELATIONS[3] if self.match.same else self.match.relation
        return replace(self.match, angle=angle, factor=factor, misfit=misfit, share=share, relation=kind)


class Comparison:
    """What was found on a few rows of a text, compared on all of them.

    Args:
        variant: the loss.
        tokens: the whole text.
        shown: the reading of the few rows.
        mixture: their decomposition; None where it is not compared.
        nearest: the methods to compare.
        classes: class weights that the loss has beside all that, or None.
        residuals: a user's own distributions, (N, V) by name.
        terms: two terms that add up to the loss, or None.
        near: the method that the loss is on most tokens, or None.

    Attributes:
        near_rows: number of rows on which it is ``near``.
        grad: the gradient of every row, (N, V).
        figures: the figures of every row.
        noise: the rounding error of every row's gradient, (N,).
        exceptions: the rows on which something does not hold.
    """

    def __init__(
        self,
        variant: Variant,
        tokens: Tokens,
        shown: Reading,
        mixture: Mixture | None,
        nearest: list[Match],
        classes: ClassWeights | None,
        residuals: Mapping[str, Tensor],
        terms: TwoTerms | None = None,
        near: NearMatch | None = None,
    ):
        self.terms, self.near, self.near_rows = terms, near, 0
        self.variant, self.tokens, self.shown, self.mixture, self.residuals = variant, tokens, shown, mixture, residuals
        self.classes = classes
        self.sums = [_MatchSums(match) for match in nearest]
        self.grad = torch.empty_like(tokens.logits, dtype=precision(tokens.logits.dtype))
        self.figures: Figures = {}
        self.noise, self.exceptions = torch.empty(0), torch.empty(0, dtype=torch.long)
        self.weights: PartWeights | None = None

    def run(self, blocks: Iterable[slice]) -> None:
        """Read every block of rows."""
        figures, noise, apart, weights = [], [], [], []
        for rows in blocks:
            with quiet():
                at = read_chunk(self.variant, self.tokens[rows], self.shown)
                self.grad[rows] = at.grad.to(self.grad)
                figures.append(token_figures(Target.from_grad(at.inputs, at.grad), at.inputs, at.losses))
                noise.append(at.noise.rows)
                off = ~at.grad.isfinite().all(-1)
                without = torch.zeros_like(off)
                if self.classes is not None:
                    at, without = _with_usual_class(at, self.classes)
                    off = off | (without & (at.grad.norm(dim=-1) > at.noise.rows))
                for one in self.sums:
                    apart_here = one.add(at)
                    off = off if apart_here is None else off | (apart_here & ~without)
                if self.terms is not None:
                    off = off | (self.terms.apart(at) & ~without)
                if self.near is not None:
                    self.near_rows += int(self.near.agrees(at).sum())
                if self.mixture is not None:
                    known = at.with_gradient(at.grad, models_taken(self.variant, at.inputs))
                    own = {name: probs[rows] for name, probs in self.residuals.items()}
                    part = weights_of_parts(self.mixture, known.grad, known.tokens, own, known.noise)
                    weights.append(replace(part, unique=part.unique & ~without.cpu()))
                    off = off | (part.misfit > MISFIT).to(off.device)
                apart.append(off.cpu())
            if len(apart) % RELEASED == 0:
                release_memory()
        self.figures, self.noise = joined(figures), torch.cat(noise)
        self.exceptions = torch.cat(apart).nonzero()[:, 0]
        self.weights = PartWeights.joined(weights) if weights else None

    def nearest(self) -> list[Match]:
        """The methods as they compare on all rows."""
        return matching.ranked([one.result(len(self.tokens)) for one in self.sums])

    def whole_mixture(self) -> Mixture | None:
        """The decomposition with the weights of every row."""
        if self.mixture is None or self.weights is None:
            return None
        w, misfit = self.weights, self.weights.misfit
        parts = {name: w.values[:, j] + 0.0 for j, name in enumerate(self.mixture.parts)}
        off = float(misfit.square().mean().sqrt())
        return replace(
            self.mixture, parts=parts, index=torch.arange(len(self.tokens)), misfit=off, held=off,
            unique=w.unique, noise=w.noise,
        )  # fmt: skip


def _with_usual_class(at: Reading, classes: ClassWeights) -> tuple[Reading, Bool[Tensor, " n"]]:
    """The reading as if all labels had the usual weight; and the rows whose weight is 0, which stay as they are."""
    weights = classes.of(at.inputs.labels)
    without = weights == 0
    return at.weighted(torch.where(without, 1.0, classes.usual / torch.where(without, 1.0, weights))), without


class TextRows:
    """The rows of a text as weight functions are fitted on them: their features, and the rounding error of their gradient."""

    def __init__(self, tokens: Tokens, noise: Float[Tensor, " N"]):
        self.inputs, self.tokens = tokens, TokenFeatures.of(tokens)
        self.noise = Noise(noise, torch.zeros_like(noise))
