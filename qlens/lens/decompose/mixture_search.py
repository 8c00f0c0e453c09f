"""Mixture search: the fewest named distributions with g = sum_j w_j (p - R_j), their parameters and weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar, nnls
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.numerics import spread
from qlens.core.tokens import Tokens
from qlens.lens.decompose.mixture import RAW, Mixture
from qlens.lens.decompose.part_weights import distance_apart, identifiable, solved, weight_noise
from qlens.lens.decompose.residuals import Residual, dictionary
from qlens.lens.rounding import TOLERANCE, Noise, rounding

MOST_PARTS = 4
FEWEST_TOKENS, ENTRIES = 24, 2**20  # fewer tokens where the vocabulary is large
MOST_TOKENS = 128  # evenly spread tokens on which a mixture must hold
REFINED = 8  # sets of residuals of each size whose parameter is fitted to the last digit
REMEMBERED = 2**25  # entries of the columns that are remembered
TOGETHER = 2**22  # entries of the columns solved at once
ALL, FITTED, HELD_OUT = "all tokens", "every other token", "the others"


def decompose(
    grad: Float[Tensor, "N V"],
    tokens: Tokens,
    residuals: Mapping[str, Tensor] | None = None,
    noise: Noise | None = None,
) -> Mixture:
    r"""The decomposition of a gradient with the fewest parts: :math:`g = \sum_j w_j (p - R_j)`.

    Weights are free on every token. A parameter (a temperature, eta or k) is the same for all: fitted on every other token and
    tested on the others. Fewer parts win, then fewer parameters, then non-negative weights, then the smaller misfit.

    Args:
        grad: logit gradients of the unreduced loss, (N, V).
        tokens: the tokens that they belong to.
        residuals: further distributions, (N, V) by name.
        noise: rounding error of the gradient; by default estimated from its digits.

    Returns:
        The decomposition, exact or the best there is.

    Raises:
        InputError: a residual of another shape than the logits.

    Example:
        >>> import qlens
        >>> t = qlens.probes()
        >>> list(decompose(qlens.get("kd_hybrid").target(t).grad, t).parts)
        ['the label', 'the teacher']
    """
    check_residuals(residuals or {}, tokens)
    tokens, noise = tokens.with_precision(torch.float64), noise or rounding(grad, tokens)
    number = min(MOST_TOKENS, max(FEWEST_TOKENS, ENTRIES // tokens.logits.shape[1]))
    picked = spread(len(tokens), number).to(tokens.logits.device)
    own = {name: probs[picked] for name, probs in (residuals or {}).items()}
    return _Search(grad[picked].detach().double(), tokens[picked], own, noise[picked]).run(picked.cpu())


def check_residuals(residuals: Mapping[str, Tensor], tokens: Tokens) -> None:
    """Check that distributions have the shape of the logits.

    Raises:
        InputError: one of another shape.
    """
    for name, probs in residuals.items():
        if tuple(probs.shape) != tuple(tokens.logits.shape):
            shape = tuple(tokens.logits.shape)
            raise InputError(f"residuals[{name!r}] has shape {tuple(probs.shape)}, but the logits have {shape}")


def decompose_again(mixture: Mixture, grad: Float[Tensor, "N V"], tokens: Tokens, noise: Noise) -> Mixture:
    """The decomposition on other tokens into the same parts, else into those that fit."""
    search = _Search(grad.detach().double(), tokens.with_precision(torch.float64), {}, noise)
    value = mixture.parameter and mixture.parameter[1]
    by_name = {entry.name_at(value): entry for entry in search.entries}
    if mixture.explains and set(mixture.parts) <= set(by_name):
        decomposition = search.mixture(tuple(by_name[name] for name in mixture.parts), value, torch.arange(len(tokens)))
        if decomposition.explains:
            return decomposition
    few = spread(len(tokens), FEWEST_TOKENS).to(tokens.logits.device)
    decomposition = None if mixture.explains else decompose(grad[few], tokens[few], None, noise[few])
    if decomposition is None or decomposition.explains:  # no decomposition of a few tokens, none of all
        return decompose(grad, tokens, None, noise)
    return replace(decomposition, index=few.cpu()[decomposition.index])


@dataclass(frozen=True)
class _Rows:
    """Some of the tokens, their gradient, (n, V), and its sizes, (n,)."""

    where: Tensor
    tokens: Tokens
    g: Tensor
    size: Tensor


class _Search:
    """The search for the decomposition of one gradient.

    Args:
        g: logit gradients of the unreduced loss, (N, V), in float64.
        tokens: the tokens that they belong to, in float64.
        own: further distributions, (N, V) by name.
        noise: rounding error of the gradient.
    """

    def __init__(self, g: Tensor, tokens: Tokens, own: Mapping[str, Tensor], noise: Noise):
        self.g, self.tolerance = g, TOLERANCE
        self.rounding = noise.rows
        sizes = g.norm(dim=-1)
        share = (noise.rows / sizes)[sizes > noise.rows]  # tokens without a gradient have no digits
        self.digits = float(share.median()) if len(share) else 1.0
        self.size = sizes + noise.rows / TOLERANCE  # rounding counts as the tolerance
        fitted = torch.arange(len(g), device=g.device) % 2 == 0
        self.rows = {
            name: _Rows(where, tokens[where].cached(), g[where], self.size[where])
            for name, where in ((ALL, fitted | True), (FITTED, fitted), (HELD_OUT, ~fitted))
        }
        self.p = self.rows[ALL].tokens.probs
        self.column_cache: dict[tuple[str, float | None, str], Tensor] = {}
        self.entries, self.alike = self._distinct(dictionary(tokens, own))
        if not bool((g.sum(-1).abs() <= TOLERANCE * g.norm(dim=-1) + noise.sums).all()):
            self.entries.insert(0, Residual(RAW, lambda t: torch.zeros_like(t.probs)))

    def _distinct(self, entries: list[Residual]) -> tuple[list[Residual], tuple[tuple[str, str], ...]]:
        """Residuals that differ somewhere, and the pairs that coincide."""
        distinct, alike = [], []
        for entry in entries:
            twin = None if entry.parameter else next((k for k in distinct if self._same(k, entry)), None)
            itself = twin is None and not entry.parameter
            if itself and float((entry.at(self.rows[ALL].tokens, None) - self.p).abs().max()) < 1e-12:
                alike.append(("the student", entry.name))
            elif twin is not None:
                alike.append((twin.name, entry.name))
            else:
                distinct.append(entry)
        return distinct, tuple(alike)

    def _same(self, a: Residual, b: Residual) -> bool:
        if a.parameter:
            return False
        return float((a.at(self.rows[ALL].tokens, None) - b.at(self.rows[ALL].tokens, None)).abs().max()) < 1e-12

    def column(self, entry: Residual, value: float | None, rows: str = ALL) -> Tensor:
        """p - R at unit length on some tokens, (N, V); those of the grid are remembered."""
        key = (entry.name, value if entry.parameter else None, rows)
        if key in self.column_cache:
            return self.column_cache[key]
        if rows != ALL and key[1] is None:  # a user's own distributions are those of all tokens
            column = self.column(entry, None)[self.rows[rows].where]
        else:
            tokens = self.rows[rows].tokens
            column = tokens.probs - entry.at(tokens, key[1])
            column = column / column.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        room = (len(self.column_cache) + 1) * self.g.numel() <= REMEMBERED
        if key[1] is None or (value in entry.grid and room):  # a fitted value is seldom needed again
            self.column_cache[key] = column
        return column

    def columns(self, chosen: tuple[Residual, ...], values: Sequence[float | None], rows: str = ALL) -> Tensor:
        """The columns of a set at some values of its parameter, (values, N, V, J)."""
        every = [
            torch.stack([self.column(entry, value, rows) for value in values])
            if entry.parameter
            else self.column(entry, None, rows).expand(len(values), -1, -1)
            for entry in chosen
        ]
        return torch.stack(every, -1)

    def solve(self, chosen: tuple[Residual, ...], value: float | None) -> Tensor:
        """Coefficients of the unit columns, (N, J)."""
        r, on = (part[0] for part in _projected(self.columns(chosen, [value]), self.g)[:2])
        return solved(r, on)

    def misses(self, chosen: tuple[Residual, ...], values: Sequence[float | None], rows: str) -> list[float]:
        """The root mean square misfit over some tokens, at every value."""
        g, size = self.rows[rows].g, self.rows[rows].size
        misfits, few = [], max(1, TOGETHER // (g.numel() * len(chosen)))
        for at in range(0, len(values), few):
            distance = _projected(self.columns(chosen, values[at : at + few], rows), g)[2]
            misfits += (distance / size).square().mean(-1).sqrt().tolist()
        return misfits

    def miss(self, chosen: tuple[Residual, ...], value: float | None, rows: str) -> float:
        """The root mean square misfit over some tokens."""
        return self.misses(chosen, [value], rows)[0]

    def run(self, picked: Tensor) -> Mixture:
        """The simplest exact decomposition; else the best of the largest size."""
        if float(self.g.abs().max()) == 0:
            return self.mixture((), None, picked)
        best = None
        for size in range(1, min(MOST_PARTS, self.g.shape[1] - 2) + 1):
            candidates = self._of_size(size)
            good = [one for one in candidates if self._explains(*one)]
            if good:
                return self.mixture(*min(good, key=self._order), picked)
            best = min([*candidates, *([best] if best else [])], key=lambda one: self.miss(*one, FITTED))
        return self.mixture(*best, picked) if best else self.mixture((), None, picked)

    def _of_size(self, size: int) -> list[tuple[tuple[Residual, ...], float | None]]:
        """Sets of ``size`` residuals with at most one parameter among them, fitted in the most promising sets."""
        plain, free = [], []
        for chosen in combinations(self.entries, size):
            parameters = {entry.parameter for entry in chosen if entry.parameter}
            if not parameters:
                plain.append((chosen, None))
            elif len(parameters) == 1 and size <= 3:
                grid = next(entry.grid for entry in chosen if entry.parameter)
                if grid:
                    miss, value = min(zip(self.misses(chosen, grid, FITTED), grid, strict=True))
                    free.append((miss, chosen, value))
        free.sort(key=lambda one: one[0])
        return plain + [self._refined(*one[1:]) for one in free[:REFINED]]

    def _refined(self, chosen: tuple[Residual, ...], value: float) -> tuple[tuple[Residual, ...], float | None]:
        """The set with its parameter fitted between its neighbours on the grid; a k is a whole number."""
        entry = next(entry for entry in chosen if entry.parameter)
        grid = sorted(entry.grid)
        at = grid.index(value)
        low, high = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
        if entry.parameter == "k":
            wholes = range(int(low), int(high) + 1)
            return chosen, float(min(wholes, key=lambda k: self.miss(chosen, float(k), FITTED)))
        low, high = (low / 2, high) if at == 0 else (low, high * 4 if at == len(grid) - 1 else high)
        if value > 1:
            low = max(low, 1.05)
        elif entry.parameter == "temperature":
            high = min(high, 0.95)
        optimum = minimize_scalar(_cost(self, chosen), bounds=(low, high), method="bounded", options={"xatol": 1e-11})
        near = float(f"{optimum.x:.6g}")  # a short number, if it fits as well
        as_well = self.miss(chosen, near, FITTED) <= max(self.tolerance, float(optimum.fun))
        return chosen, near if as_well else optimum.x

    def _explains(self, chosen: tuple[Residual, ...], value: float | None) -> bool:
        halves = [rows for rows in (FITTED, HELD_OUT) if len(self.rows[rows].g)]
        return all(self.miss(chosen, value, rows) <= self.tolerance for rows in halves)

    def _order(self, one: tuple[tuple[Residual, ...], float | None]) -> tuple:
        mixture = self.mixture(*one, torch.arange(len(self.g)))
        varied = sum(float(c[mixture.unique].std() / c[mixture.unique].abs().mean()) for c in mixture.parts.values())
        return one[1] is not None, mixture.signed, -int(mixture.unique.sum()), round(varied, 6), mixture.misfit

    def mixture(self, chosen: tuple[Residual, ...], value: float | None, picked: Tensor) -> Mixture:
        """The decomposition into a set of residuals."""
        if not chosen:
            return Mixture({}, picked, 0.0, 0.0, not bool(self.g.any()), torch.ones(len(self.g)) > 0, alike=self.alike)
        unit = self.solve(chosen, value)
        lengths = torch.stack([(self.p - e.at(self.rows[ALL].tokens, value)).norm(dim=-1) for e in chosen], -1)
        a = torch.stack([self.column(entry, value) for entry in chosen], -1)
        apart = distance_apart(a)
        unique = identifiable(apart, lengths)
        c = torch.where(lengths > 0, unit / lengths.clamp(min=1e-300), 0.0)
        explains = self._explains(chosen, value)
        held_out_misfit = self.miss(chosen, value, HELD_OUT) if len(self.rows[HELD_OUT].g) else 0.0
        entry = next((entry for entry in chosen if entry.parameter), None)
        return Mixture(
            {e.name_at(value): c[:, j].cpu() + 0.0 for j, e in enumerate(chosen)},
            picked,
            self.miss(chosen, value, FITTED),
            held_out_misfit,
            explains,
            unique.cpu(),
            (entry.parameter, float(value)) if entry is not None and value is not None else None,
            None if explains else self._closest(),
            self.alike,
            TOLERANCE + self.digits,
            weight_noise(self.rounding, apart, lengths).cpu(),
        )

    def _closest(self) -> float:
        """The misfit of the best non-negative mixture of all fixed residuals, token by token (scipy's nnls)."""
        a = torch.stack([self.column(e, None) for e in self.entries if not e.parameter], -1).cpu().numpy()
        residual_norms = torch.tensor([nnls(rows, g)[1] for rows, g in zip(a, self.g.cpu().numpy(), strict=True)])
        return float((residual_norms / self.size.cpu()).square().mean().sqrt())


def _projected(columns: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The R of a QR decomposition of the columns, Q^T g, and the distance of g from them at every token, (..., N)."""
    q, r = torch.linalg.qr(columns)
    on = q.mT @ grad[..., None]
    return r, on, (grad - (q @ on)[..., 0]).norm(dim=-1)


def _cost(search: _Search, chosen: tuple[Residual, ...]) -> Callable[[float], float]:
    return lambda value: search.miss(chosen, float(value), FITTED)
