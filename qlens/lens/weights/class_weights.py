"""Class weights: weights by label id, found by giving the label of one token every id in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.tokens import MODELS, Tokens
from qlens.lens.identify.matching import written
from qlens.lens.reading import Reading
from qlens.lens.rounding import TOLERANCE, rounding
from qlens.lens.weights.label_weights import trial_gradient
from qlens.registry.variant import Variant

SHOWN = 6  # weights listed in a sentence
SHARED = 4  # ids of one weight that are listed one by one
PARTS = 3  # batches, of every third token each, on which a division by the mean weight is tested
SIGNIFICANT = 1e3  # least gradient of the token whose label is changed, as a multiple of its rounding error
USUAL_P = 0.35  # p_y of that token


@dataclass(frozen=True)
class ClassWeights:
    """Weights by label id.

    Args:
        weights: the gradient's factor for every id tested.
        usual: the weight that counts as 1: that of most ids, else the smallest; of the non-zero ones where most are 0.
        equal: whether the ids change a factor only, not the direction of the gradient.
        divided: whether the gradient is divided by the batch's mean weight.
    """

    weights: dict[int, float]
    usual: float
    equal: bool = True
    divided: bool = False

    @property
    def unusual(self) -> dict[int, float]:
        """The ids whose weight is not the usual one."""
        return {i: w for i, w in self.weights.items() if abs(w - self.usual) > 1e-4 * abs(self.usual)}

    @property
    def untested_weight(self) -> float:
        """The weight assumed for ids that were not tested: 0 where that of most ids is 0."""
        return 0.0 if list(self.weights.values()).count(0.0) * 2 > len(self.weights) else self.usual

    def of(self, labels: Tensor) -> Tensor:
        """The weight of every label, (N,)."""
        weights = [self.weights.get(int(label), self.untested_weight) for label in labels]
        return torch.tensor(weights, dtype=torch.float64, device=labels.device)

    def factor(self, labels: Tensor) -> Tensor:
        """The factor of every token's gradient in a batch of these labels, (N,)."""
        weights = self.of(labels)
        mean = float(weights.mean())
        return weights / mean if self.divided and mean != 0 else weights

    def __str__(self) -> str:
        if not self.equal:
            return "permuting the ids of the vocabulary changes the gradient"
        by_weight: dict[float, list[int]] = {}
        for i, weight in self.weights.items():
            by_weight.setdefault(weight + 0.0, []).append(i)
        groups = sorted(by_weight.items(), key=lambda group: len(group[1]))
        listed = [f"{weight:.5g} for {_ids(ids, len(self.weights))}" for weight, ids in groups[:-1][:SHOWN]]
        more = f", ... ({len(groups) - 1 - SHOWN} further weights)" if len(groups) - 1 > SHOWN else ""
        weight, ids = groups[-1]
        many = f" ({len(ids)} of {len(self.weights)} ids)" if len(groups) > 1 else ""
        usual = f"{weight:.5g} for the others{many}" if len(ids) > 1 else f"{weight:.5g} for id {ids[0]}"
        mean = ", divided by the batch's mean weight" if self.divided else ""
        tested_ids = f"(ids {min(self.weights)} to {max(self.weights)} tested)"
        return f"weights by label id{mean}: {', '.join(listed)}{more}, {usual} {tested_ids}"


def _ids(ids: list[int], number_tested: int) -> str:
    """Ids in words: one by one where they are few, as ranges where these are."""
    if len(ids) == 1:
        return f"id {ids[0]}"
    ids, starts = sorted(ids), []
    for i in ids:
        if starts and i == starts[-1][1] + 1:
            starts[-1][1] = i
        else:
            starts.append([i, i])
    ranges = [str(low) if low == high else f"{low} to {high}" for low, high in starts]
    return (
        f"ids {', '.join(ranges)}" if len(ranges) <= SHARED else f"{len(ids)} of {number_tested} ids ({ranges[0]}, ...)"
    )


def find_class_weights(variant: Variant, at: Reading, ids: Sequence[int]) -> ClassWeights | None:
    """The class weights of a loss, tested on one token with a gradient far above rounding and p_y near 0.35; or None.

    Args:
        variant: the loss.
        at: its gradient on some tokens.
        ids: the label ids to test.

    Raises:
        InputError: the loss fails on a batch of copies of one token.
    """
    significant = at.grad.norm(dim=-1) > SIGNIFICANT * at.noise.rows
    if len(ids) < 2 or not bool(significant.any()):
        return None
    distance = torch.where(significant, (at.tokens.label_probs - USUAL_P).abs(), torch.inf)
    return class_weights(variant.loss, at.inputs, int(distance.argmin()), ids, at.arithmetic)


def class_weights(
    loss: Callable[[Tokens], Tensor], tokens: Tokens, row: int, ids: Sequence[int], precision: torch.dtype
) -> ClassWeights | None:
    """How a gradient changes when the vocabulary is permuted so that one token's label has another id; None if it does not.

    The permutations are random, so that neighbouring ids are separated. The weights must be the same in two orders of the ids;
    otherwise they depend on a token's place in the batch.

    Args:
        loss: an unreduced loss, tokens -> (N,).
        tokens: where to test it; without pairs.
        row: the token whose label is given every id, in a batch of its copies.
        ids: the ids to test.
        precision: what the loss computes in.

    Raises:
        InputError: the loss fails on such a batch; what it raised is named.
    """
    factors = _factors(loss, tokens, row, ids, precision)
    reversed_factors = factors and _factors(loss, tokens, row, list(reversed(ids)), precision)
    if factors is None or reversed_factors is None:
        return None
    ratio, equal, digits = factors
    if equal and any(
        abs(a - b) > 10 * digits * max(abs(a), 1) for a, b in zip(ratio, reversed(reversed_factors[0]), strict=True)
    ):
        return None
    ratio = [written(r, 10 * digits) + 0.0 if abs(r) > 10 * digits else 0.0 for r in ratio]
    nonzero = [r for r in ratio if r]
    usual = max(set(nonzero), key=nonzero.count)
    if nonzero.count(usual) * 2 <= len(nonzero):
        usual = min(nonzero, key=abs)
    weights = {int(i): written(r / usual, 10 * digits) for i, r in zip(ids, ratio, strict=True)}
    return ClassWeights(weights, 1.0, equal)


def _factors(
    loss: Callable[[Tokens], Tensor], tokens: Tokens, row: int, ids: Sequence[int], precision: torch.dtype
) -> tuple[list[float], bool, float] | None:
    """The gradient's factor at every id, whether its direction is the same, and the relative precision; None without effect."""
    size, count, device = tokens.logits.shape[1], len(ids), tokens.logits.device
    where = torch.as_tensor(ids, device=device)
    draw = torch.Generator().manual_seed(0)
    source = torch.rand(count, size, generator=draw).argsort(-1).to(device)  # which entry goes to each place
    at = (source == tokens.labels[row]).int().argmax(-1, keepdim=True)
    source = source.scatter(1, at, source.gather(1, where[:, None]))
    source = source.scatter(1, where[:, None], int(tokens.labels[row]))
    copies = tokens[torch.full((count,), row, device=device)]
    fields = {name: getattr(copies, name).gather(1, source) for name in (*MODELS, "logits", "negatives")
              if getattr(copies, name) is not None}  # fmt: skip
    if copies.sequence is not None:
        fields["sequence"] = torch.arange(count, device=device)
    same = copies.replace(labels=where.to(copies.labels.dtype), **fields)
    grad = trial_gradient(loss, same)
    noise = rounding(grad, same, precision).rows
    back = torch.zeros_like(grad).scatter(1, source, grad)
    sizes = back.norm(dim=-1)
    significant = sizes > 100 * noise
    if not bool(significant.any()):
        return None
    usual_row = int((sizes - sizes[significant].median()).abs().argmin())
    base = back[usual_row]
    ratio = (back * base).sum(-1) / base.square().sum()
    digits = TOLERANCE + float(noise[usual_row] / sizes[usual_row])
    distance = (back - ratio[:, None] * base).norm(dim=-1)
    equal = bool((distance <= 10 * digits * sizes.maximum(sizes[usual_row])).all())
    if equal and float((ratio - 1).abs().max()) <= 10 * digits:
        return None
    return ratio.tolist(), equal, digits


def with_usual_class(variant: Variant, at: Reading, classes: ClassWeights | None) -> Reading:
    """The gradient on the same tokens as if all label ids had the usual weight.

    Args:
        variant: the loss.
        at: its gradient.
        classes: its class weights, or None.
    """
    if classes is None or not classes.equal:
        return at
    size = at.inputs.logits.shape[1]
    weights = {i: weight for i, weight in classes.weights.items() if i < size and weight}
    if not weights:
        return at
    label = min(weights, key=lambda i: (weights[i] != classes.usual, i))
    same = Reading.of(variant, relabelled(at.inputs, label))
    if weights[label] == classes.usual:
        return same
    factor = classes.usual / weights[label]
    return same.weighted(torch.full((len(same.inputs),), factor, dtype=torch.float64, device=same.grad.device))


def relabelled(tokens: Tokens, label: int) -> Tokens:
    """The same tokens with one label id for all: in every row the entries of that id and of the label are swapped."""
    ids = torch.arange(tokens.logits.shape[1], device=tokens.logits.device).repeat(len(tokens), 1)
    ids[:, label] = tokens.labels.long()
    ids = ids.scatter(1, tokens.labels[:, None].long(), label)
    values = tokens.fields()
    fields = {name: values[name].gather(1, ids) for name in (*MODELS, "logits", "negatives") if name in values}
    return tokens.replace(labels=torch.full_like(tokens.labels, label), **fields)


def divided_by_mean(
    classes: ClassWeights, loss: Callable[[Tokens], Tensor], tokens: Tokens, precision: torch.dtype
) -> ClassWeights | None:
    """The class weights as divided by the batch's mean weight, if batches of other labels differ by that; else None.

    Args:
        classes: the class weights.
        loss: an unreduced loss, tokens -> (N,).
        tokens: where to test it; without pairs.
        precision: what the loss computes in.
    """
    scaled, (whole, noise) = replace(classes, divided=True), _with_noise(loss, tokens, precision)
    for start in range(PARTS):
        few = tokens[start::PARTS]
        expected = whole[start::PARTS] / _nonzero(scaled.factor(tokens.labels)[start::PARTS])[:, None]
        grad, few_noise = _with_noise(loss, few, precision)
        actual = grad / _nonzero(scaled.factor(few.labels))[:, None]
        weighted = scaled.of(few.labels) != 0
        distance = (actual - expected).norm(dim=-1)
        allowed = 100 * TOLERANCE * expected.norm(dim=-1) + 100 * (noise[start::PARTS] + few_noise)
        if bool(weighted.any()) and bool((distance > allowed)[weighted].any()):
            return None
    return scaled


def _nonzero(weights: Tensor) -> Tensor:
    return torch.where(weights == 0, 1.0, weights)


def _with_noise(loss: Callable[[Tokens], Tensor], tokens: Tokens, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    grad = gradient(loss, tokens).double()
    return grad, rounding(grad, tokens, precision).rows
