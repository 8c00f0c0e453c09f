"""Rounding: the rounding error of a gradient, from the precision of its loss."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from qlens.core.autograd import gradient
from qlens.core.scales import carried
from qlens.core.tokens import MODELS, Tokens

TOLERANCE = 1e-6  # relative difference of two formulas of one gradient that counts as equal, besides rounding
MOVES, COARSEST_MOVES = 3, 1  # gradients at logits moved by rounding; the second for many logits
SUSPECT = 1e4  # multiples of the unit roundoff below which a gradient may be rounding
HALF = 1e-4  # unit roundoff above which a dtype is a half precision
SWITCHED, CLOSE = 0.01, 1e-8  # relative change that is a threshold or a tie, not rounding; least 1 - p of the top entry
MOVED = 0.5  # a gradient that changes by this share of its size under such a move is rounding


@dataclass(frozen=True, eq=False)
class Noise:
    """The rounding error that a gradient may hold, in float64.

    Args:
        rows: of the norm of every row, (N,).
        sums: of the sum of every row, (N,).
    """

    rows: Float[Tensor, " N"]
    sums: Float[Tensor, " N"]

    def __getitem__(self, index: Any) -> "Noise":
        """Of the chosen rows."""
        return Noise(self.rows[index], self.sums[index])


def rounding(
    grad: Float[Tensor, "N V"],
    tokens: Tokens,
    precision: torch.dtype | None = None,
    moved_grads: Sequence[Float[Tensor, "N V"]] = (),
    constants: torch.dtype = torch.float64,
) -> Noise:
    r"""The rounding error of a gradient, :math:`2 u (2 + |\log p_k| + |\log Z|)` relative to each entry, or more where measured.

    u is the unit roundoff of the precision, log Z the row's log-sum-exp. What is rounded is an entry before it cancels:
    :math:`|g_k| + s p_k`, where :math:`s = \max_k |g_k| / (1 - p_k)`, also over all entries but the top one together, is the
    size of the pulls in the row (at p_y near 1 the gradient is their small difference), at most twice the largest entry of
    all rows. Sums add the errors of all entries up, because an error of log Z has one sign in a whole row. Where gradients at
    logits moved by rounding are given, three times their distance (of sums, twice) counts if it is larger: it holds whatever
    cancels in the loss.

    Args:
        grad: logit gradients of the unreduced loss, (N, V).
        tokens: the tokens that they belong to.
        precision: of the loss's operations; by default the precision that the digits of the gradient show. Fewer digits of the
            gradient (after a cast of the logits, say) are a relative error of its entries.
        moved_grads: gradients of the same loss at logits moved by rounding (``moves``), (N, V) each.
        constants: precision of the constants that enter the loss (weights, smoothed targets).
    """
    digits = carried(grad)
    unit, digit_unit = (torch.finfo(dtype).eps / 2 for dtype in (precision or digits, digits))
    if unit > HALF:
        unit /= 4  # half precision is summed in float32: an operation rounds once, at its end
    g, z = grad.detach().double(), tokens.logits.detach().double()
    log_z = z.logsumexp(-1, keepdim=True)
    log_p = (z - log_z).clamp(min=-100.0)  # below, p is negligible
    p = log_p.exp()
    size = g.abs()
    rest = torch.where(p > 0.5, p.sum(-1, keepdim=True) - p, 1 - p).clamp(min=1e-16)
    top = p.argmax(-1, keepdim=True)
    others = size.scatter(-1, top, 0.0).sum(-1, keepdim=True) / rest.gather(-1, top)
    pulls = (size / rest).amax(-1, keepdim=True).maximum(others).clamp(max=size.amax() * 2)
    entry = 2 * unit * (2 - log_p + log_z.abs()) * (size + pulls * p) + digit_unit * size
    entry = entry + torch.finfo(constants).eps * (size + pulls * p)
    label = 2 * unit * (2 - tokens.gather(log_p) + log_z[:, 0].abs()) * g.norm(dim=-1)
    # intermediate values like 1 - p_y and coefficients are rounded at the size of a large pull, in rows of a small one too
    middle = 8 * unit * pulls.quantile(0.9)
    formulas = 4 * torch.finfo(torch.float64).eps * pulls.amax()  # two formulas of one gradient differ by this
    rows = 3 * (entry.norm(dim=-1) + label + middle / 8) + formulas
    sums = 3 * (entry.sum(-1) + label + middle)
    for other in moved_grads:
        difference = other.detach().double() - g
        switched = (difference.norm(dim=-1) > SWITCHED * g.norm(dim=-1)) & (rest.gather(-1, top)[:, 0] > CLOSE)
        if unit > torch.finfo(torch.float64).eps:  # in coarser precisions rounding does as much
            switched = torch.zeros_like(switched)
        difference = torch.where(switched[:, None], 0.0, difference)
        rows, sums = rows.maximum(3 * difference.norm(dim=-1)), sums.maximum(2 * difference.sum(-1).abs())
    return Noise(rows, sums)


def moves(tokens: Tokens, precision: torch.dtype, number: int) -> Iterator[Tokens]:
    """The same tokens with logits moved by one unit of rounding of a precision, at random."""
    draw, unit, z = torch.Generator().manual_seed(0), torch.finfo(precision).eps, tokens.logits.detach()
    for _ in range(number):
        by = 2 * unit * (torch.rand(z.shape, generator=draw, dtype=torch.float64) - 0.5).to(z)
        yield tokens.replace(logits=torch.where(z.isfinite(), z + 2 * by * (0.1 + z.abs()), z))


class _Trace(TorchDispatchMode):
    """Record the precision of all operations on values that depend on the logits.

    Attributes:
        coarsest: the least precise type among those values.
        constants: the least precise type of the other values that enter, with more digits than a half precision holds.
    """

    def __init__(self, roots: list[Tensor]):
        super().__init__()
        self.dependent, self.coarsest = WeakTensorKeyDictionary(), torch.float64
        self.digits, self.constants = WeakTensorKeyDictionary(), torch.float64
        for root in roots:
            self.dependent[root] = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skip the wrapper for torch.compile, whose import takes seconds; nothing is compiled in this mode."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [value for value in tree_leaves((args, kwargs)) if _real(value)]
        others = torch.float64
        for value in inputs:
            if value not in self.dependent:
                others = coarser(others, self._digits(value))
        if not any(value in self.dependent for value in inputs):
            for value in tree_leaves(result) if others != torch.float64 else ():
                if _real(value):
                    self.digits[value] = torch.float64 if _short(value) else others
            return result
        self.constants = coarser(self.constants, others)
        # a cast that loses no digit does not round
        exact = func is torch.ops.aten._to_copy.default and _equal(result, args[0])
        for value in tree_leaves(result):
            if _real(value):
                self.dependent[value] = True
                self.coarsest = self.coarsest if exact else coarser(self.coarsest, value.dtype)
        return result

    def _digits(self, value: Tensor) -> torch.dtype:
        """The precision of a constant; constants that half precision holds (0, 1, a mask) count as exact."""
        if value not in self.digits:
            short = value.dtype == torch.float64 or _short(value)
            self.digits[value] = torch.float64 if short else value.dtype
        return self.digits[value]


def _short(value: Tensor) -> bool:
    return _equal(value, value.to(torch.bfloat16))


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(torch.equal(one.double().nan_to_num(), other.double().nan_to_num()))


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The less precise of two floating-point types."""
    return max(a, b, key=lambda dtype: torch.finfo(dtype).eps)


def traced(loss: Callable[[Tokens], Tensor], tokens: Tokens) -> tuple[Tensor, torch.dtype, torch.dtype]:
    """The values of an unreduced loss, (N,), the coarsest dtype of its operations on the logits, and that of its constants."""
    roots = [value for name, value in tokens.fields().items() if name in ("logits", *MODELS)]
    with torch.no_grad(), _Trace(roots) as trace:
        values = loss(tokens)
    return values, trace.coarsest, trace.constants


def nothing_but_rounding(
    loss: Callable[[Tokens], Tensor], tokens: Tokens, grad: Float[Tensor, "N V"], precision: torch.dtype
) -> bool:
    """Whether a gradient is zero up to rounding: tiny, and different at logits moved a little."""
    unit, size = torch.finfo(precision).eps, grad.norm()
    if float(grad.abs().max()) > SUSPECT * unit or not bool(grad.any()):
        return not bool(grad.any())
    draw, z = torch.Generator().manual_seed(0), tokens.logits.detach()
    for _ in range(2):
        by = max(1e-3, 2 * unit) * torch.randn(z.shape, generator=draw, dtype=torch.float64).to(z)
        other = gradient(loss, tokens.replace(logits=torch.where(z.isfinite(), z + by, z)))
        if float((other - grad).norm()) <= MOVED * float(size):
            return False
    return True
