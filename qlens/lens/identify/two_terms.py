"""Two terms: two registered methods or divergences whose weighted gradients add up to that of a loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.core.tokens import Tokens
from qlens.lens.identify import matching
from qlens.lens.identify.matching import written
from qlens.lens.reading import Reading
from qlens.lens.rounding import TOLERANCE
from qlens.lens.weights.features import plain
from qlens.registry import methods, params
from qlens.registry.variant import Variant

CLOSE = 1e-10  # squared relative misfit on a few tokens up to which two terms are compared on all
PARALLEL = 1e-12  # 1 - cosine of two terms that count as one
APART = 1e-9  # determinant of two unit terms below which their factors are not identifiable
VERIFIED = 12  # pairs that are compared on all tokens, the simplest first
COLUMNS = 512  # entries of a row in the first comparison
SMALLEST = 1e-4  # least share of a term in the gradient
MOST = 4.0  # largest distance from the sum, relative to what rounding and the tolerance allow
EQUAL = 1e-3  # relative difference of a factor between two sets of tokens
CALLED = {"reference": "the reference", "teacher": "the teacher", "old": "the old policy", "second": "the second pass"}


@dataclass(frozen=True)
class TwoTerms:
    """Two terms that add up to a loss.

    Args:
        terms: the specs of registered methods, or divergences in words.
        factors: the number that each is multiplied by.
    """

    terms: tuple[str, str]
    factors: tuple[float, float]

    @property
    def odd(self) -> bool:
        """Whether a factor has more than three digits."""
        return max(map(matching.digits, self.factors)) > matching.SHORT

    def apart(self, at: Reading) -> Bool[Tensor, " n"]:
        """The tokens on which the terms do not add up to a gradient."""
        by_name = {term.name: term for term in _terms(at.tokens, "")}
        grads = [by_name[name].of(at.tokens) if name in by_name else None for name in self.terms]
        if grads[0] is None or grads[1] is None:
            return torch.ones_like(at.noise.rows, dtype=torch.bool)
        terms = torch.stack([grads[0].double(), grads[1].double()], -1)
        return _distance(at, terms, terms.new_tensor(self.factors)) > MOST

    def __str__(self) -> str:
        (first, second), (a, b) = self.terms, self.factors
        head = _times(first, a) if a > 0 else f"minus {_times(first, -a)}"
        return f"{head} {'plus' if b > 0 else 'minus'} {_times(second, abs(b))}"


@dataclass(frozen=True)
class _Term:
    """A term: its name, its gradient and its order by simplicity.

    Args:
        name: a spec, or a divergence in words.
        of: its gradient on tokens, (N, V); None where these lack a field.
        order: number of parameters not at their defaults, whether it is a sum itself, fields needed, length of the name.
    """

    name: str
    of: Callable[[Tokens], Tensor | None]
    order: tuple[int, int, int, int]


def two_terms(few: Reading, readings: Sequence[Reading], skip: str = "") -> TwoTerms | None:
    """The simplest two terms whose gradients, each times one number of either sign, add up to a gradient; or None.

    Terms are all registered methods at their defaults, presets and ends, the entropy, and the KL divergences from and to the
    uniform distribution and every other model.

    Args:
        few: the gradient on a few dozen tokens, on which all pairs are compared.
        readings: the gradient on all tokens and on further ones; the numbers must be the same on each.
        skip: the name of a method to leave out.
    """
    tokens, columns = few.tokens, _columns(few.tokens)
    sizes = few.grad.norm(dim=-1)
    weight = torch.where(few.zero_rows, 0.0, 1 / (sizes + few.noise.rows / TOLERANCE).clamp(min=1e-300))[:, None]
    goal = (few.grad * weight).gather(1, columns).flatten()
    if not bool(goal.any()):
        return None
    terms, rows = [], []
    for term in _terms(tokens, skip):
        grad = term.of(tokens)
        if grad is not None and bool(grad.any()):
            terms.append(term)
            rows.append((grad.double() * weight).gather(1, columns).flatten())
    rounding = float((weight[:, 0] * few.noise.rows).square().sum())
    pairs = [(terms[i], terms[j]) for i, j in _pairs(torch.stack(rows), goal, rounding)] if rows else []
    pairs = sorted(pairs, key=lambda pair: _sum_of(pair[0].order, pair[1].order))[:VERIFIED]
    sums = [(pair, factors) for pair in pairs if (factors := _same_everywhere(pair, readings)) is not None]
    if not sums:
        return None
    pair, factors = min(sums, key=lambda one: _complexity(*one))
    ordered = sorted(zip(pair, factors, strict=True), key=lambda one: (one[1] < 0, one[0].order))
    (first, a), (second, b) = ordered
    return TwoTerms((first.name, second.name), (a, b))


def _pairs(terms: Float[Tensor, "T E"], goal: Float[Tensor, " E"], rounding: float) -> list[tuple[int, int]]:
    """The pairs of terms that add up to the goal on a few tokens, all at once from their inner products."""
    unit = terms / terms.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    cosine = unit @ unit.mT
    twin = (cosine.abs() > 1 - PARALLEL).tril(-1).any(-1)  # of equal terms only the simplest is kept
    along, size = unit @ goal, float(goal.square().sum())
    apart = 1 - cosine.square()
    number = (along[:, None] - cosine * along) / apart.clamp(min=APART)  # factor of the row's term
    misfit = size - number * along[:, None] - number.mT * along
    large = number.abs() > SMALLEST * size**0.5
    good = (misfit <= CLOSE * size + rounding) & (apart > APART) & large & large.mT & ~twin & ~twin[:, None]
    return [(i, j) for i, j in good.triu(1).nonzero().tolist()]


def _same_everywhere(pair: tuple[_Term, _Term], readings: Sequence[Reading]) -> tuple[float, float] | None:
    """The factors of two terms that add up to the gradient on every token of all readings, rounded if possible; or None."""
    solutions = []
    for at in readings:
        grads = [term.of(at.tokens) for term in pair]
        if grads[0] is None or grads[1] is None:
            return None
        terms = torch.stack([grads[0].double(), grads[1].double()], -1)
        weight = 1 / _allowed(at, terms)[:, None]
        a, b = (terms * weight[..., None]).flatten(0, 1), (at.grad * weight).flatten()
        exact = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
        spread = 10 * TOLERANCE + float((at.noise.rows / at.grad.norm(dim=-1).clamp(min=1e-300)).median())
        short = exact.new_tensor([written(value, spread) for value in exact.tolist()])
        good = [one for one in (short, exact) if bool((_distance(at, terms, one) <= MOST).all())]
        if not good or bool((good[0] == 0).any()):
            return None
        solutions.append(good[0].cpu())
    first = solutions[0]
    same = all(bool(((other - first).abs() <= EQUAL * first.abs()).all()) for other in solutions)
    return (float(first[0]), float(first[1])) if same else None


def _allowed(at: Reading, terms: Float[Tensor, "n V 2"]) -> Float[Tensor, " n"]:
    """The distance from the sum of two terms that rounding and the tolerance allow."""
    size = terms.norm(dim=-2).amax(-1).maximum(at.grad.norm(dim=-1))
    return (TOLERANCE * size + at.noise.rows).clamp(min=1e-300)


def _distance(at: Reading, terms: Float[Tensor, "n V 2"], factors: Float[Tensor, " 2"]) -> Float[Tensor, " n"]:
    """The distance of a gradient from the weighted sum of two terms, relative to what is allowed."""
    return (at.grad - terms @ factors).norm(dim=-1) / _allowed(at, terms)


def _terms(tokens: Tokens, skip: str) -> list[_Term]:
    """All terms, the simplest first."""
    points = [point for method in methods().values() if method.name != skip for point in matching.points(method)]
    return sorted([*map(_method, points), *_divergences(tokens)], key=lambda term: term.order)


def _method(point: Variant) -> _Term:
    changed, of_two = len(params.parse(point.spec)[1]), bool({"weight", "nll"} & set(point.params))
    order = (changed, int(of_two), len(point.needs), len(point.spec))
    return _Term(point.spec, lambda t: matching.method_gradient(point, t), order)


def _divergences(tokens: Tokens) -> list[_Term]:
    """The entropy, and KL divergences from and to the uniform distribution and the models that the tokens hold."""

    def term(name: str, of: Callable[..., Tensor], model: str = "") -> _Term:
        def gradient(t: Tokens) -> Tensor | None:
            if not model:
                return of(t)
            return None if getattr(t, model) is None else of(t, t.log_probs_of(model).double())

        return _Term(name, gradient, (0, 0, int(bool(model)), len(name)))

    divergences = [
        term("the entropy of p", lambda t: -_reverse(t, torch.zeros_like(t.logits))),
        term("KL(uniform || p)", lambda t: t.probs - 1 / t.logits.shape[1]),
    ]
    for model in (name for name in CALLED if getattr(tokens, name) is not None):
        divergences.append(term(f"KL(p || {CALLED[model]})", _reverse, model))
        divergences.append(term(f"KL({CALLED[model]} || p)", lambda t, log_q: t.probs - log_q.exp(), model))
    return divergences


def _reverse(t: Tokens, log_q: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """The gradient of KL(p || q); entries without probability do not count."""
    log_ratio = torch.where(t.probs > 0, t.log_probs.detach() - log_q, 0.0)
    return t.probs * (log_ratio - (t.probs * log_ratio).sum(-1, keepdim=True))


def _columns(tokens: Tokens) -> Tensor:
    """The entries of every row in the first comparison: all of a small vocabulary, else likely and evenly spread ones."""
    v = tokens.logits.shape[1]
    every = torch.arange(v, device=tokens.logits.device)
    if v <= COLUMNS:
        return every.expand(len(tokens), v)
    top = tokens.logits.topk(COLUMNS // 4, -1).indices
    some = every[:: 2 * v // COLUMNS].expand(len(tokens), -1)
    return torch.cat([tokens.labels[:, None].long(), top, some], 1)


def _sum_of(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _complexity(pair: tuple[_Term, _Term], factors: tuple[float, float]) -> tuple[float, ...]:
    """Sort key of two terms and their factors, the simplest first."""
    changed, *rest = _sum_of(pair[0].order, pair[1].order)
    return (round(changed + sum(map(matching.factor_penalty, factors)), 6), *rest)


def _times(name: str, factor: float) -> str:
    return name if factor == 1 else f"{plain(factor)} times {name}"
