"""Heads: logits computed from hidden states, some rows at a time; and models known by their top-k probabilities."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qlens.core.errors import InputError, brief
from qlens.core.numerics import log_softmax, precision
from qlens.core.tokens.fields import number

FLOOR = 110.0
"""Nats below a row's largest logit at which an entry has probability 0 in float32, and a finite logarithm."""


def fitted(logits: Float[Tensor, "n W"], vocabulary: int) -> Float[Tensor, "n V"]:
    """Logits over the first V entries: further ones are cut off, missing ones lie ``FLOOR`` below the row's largest.

    Their softmax is p over the common entries, renormalised, and 0 at the missing ones.

    Example:
        >>> fitted(torch.tensor([[0.0, 1.0, 2.0]]), 2), fitted(torch.tensor([[0.0, 1.0]]), 3)
        (tensor([[0., 1.]]), tensor([[   0.,    1., -109.]]))
    """
    missing = vocabulary - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocabulary]
    floor = logits.amax(-1, keepdim=True) - FLOOR
    return torch.cat([logits, floor.expand(*floor.shape[:-1], missing)], -1)


@dataclass(frozen=True, eq=False)
class Head:
    r"""Logits :math:`z = c \tanh(s (h W^T + b) / c)` of hidden states, computed for some rows at a time.

    Args:
        hidden: h, (N, H).
        weight: W, (V, H).
        bias: b, (V,), or None.
        softcap: c, or None for no cap (Gemma).
        logit_scale: s (Cohere; Granite divides: 1 / its scaling).
        vocabulary: the number of logits, where W has fewer rows: see ``fitted``.

    Raises:
        InputError: shapes or dtypes that do not fit, or a cap or scale that is not finite, is 0, or, for a cap, below 0.

    Example:
        >>> Head(torch.ones(1, 2), torch.tensor([[1.0, 1.0], [0.0, 3.0]]), softcap=3.0).logits(slice(None))
        tensor([[1.7483, 2.2848]])
    """

    hidden: Float[Tensor, "N H"]
    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    vocabulary: int | None = None

    def __post_init__(self):
        h, w, b = self.hidden, self.weight, self.bias
        if not isinstance(h, Tensor) or not isinstance(w, Tensor):
            raise InputError(f"hidden and head must be tensors, got {type(h).__name__} and {type(w).__name__}")
        if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1]:
            raise InputError(f"hidden must be (N, H) and head (V, H), got {tuple(h.shape)} and {tuple(w.shape)}")
        if h.dtype != w.dtype:
            raise InputError(f"hidden is {h.dtype}, but head is {w.dtype}: they must have one dtype")
        if b is not None and tuple(b.shape) != (w.shape[0],):
            raise InputError(f"bias must be ({w.shape[0]},), got {tuple(b.shape)}")
        for name in ("softcap", "logit_scale"):
            if (value := getattr(self, name)) is None and name == "softcap":
                continue
            object.__setattr__(self, name, number(name, value, "a finite number other than 0"))
            if not getattr(self, name):
                raise InputError(f"{name} must be a finite number other than 0, got {brief(value)}")
        if self.softcap is not None and self.softcap < 0:
            raise InputError(f"softcap must be above 0, got {self.softcap}")

    def __repr__(self) -> str:
        (rows, width), options = self.hidden.shape, ""
        options += "" if self.softcap is None else f", softcap {self.softcap:g}"
        options += "" if self.logit_scale == 1 else f", logit_scale {self.logit_scale:g}"
        return f"<Head: {rows} rows of width {width}, vocabulary {self.width}, {self.hidden.dtype}{options}>"

    @property
    def width(self) -> int:
        """V, the number of logits."""
        return len(self.weight) if self.vocabulary is None else self.vocabulary

    def fitted(self, vocabulary: int) -> "Head":
        """This head over another number of entries, as ``qlens.engine.heads.fitted`` has its logits."""
        if vocabulary >= len(self.weight):
            return replace(self, vocabulary=vocabulary)
        bias = None if self.bias is None else self.bias[:vocabulary]
        return replace(self, weight=self.weight[:vocabulary], bias=bias, vocabulary=None)

    def to(self, device: torch.device) -> "Head":
        """This head on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, hidden=self.hidden.to(device), weight=self.weight.to(device), bias=bias)

    def products(self, rows: slice, buffer: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """h W^T of some rows in their own dtype, without bias, scale and cap, in the buffer's first rows."""
        hidden = self.hidden[rows]
        return torch.mm(hidden, self.weight.T, out=buffer[: len(hidden)])

    def logits(self, rows: slice | Tensor, buffer: Tensor | None = None) -> Float[Tensor, "n V"]:
        """The logits of some rows in float32 at least, in the buffer's first rows if one is given."""
        hidden, wide = self.hidden[rows], precision(self.hidden.dtype)
        if buffer is not None and buffer.dtype == self.hidden.dtype and self.width == len(self.weight):
            z = torch.mm(hidden, self.weight.T, out=buffer[: len(hidden)])
        else:
            z = (hidden @ self.weight.T).to(wide)
        if self.bias is not None:
            z += self.bias
        return fitted(capped_(z, self.softcap, self.logit_scale), self.width)

    def slope_(self, z: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """The slope of the soft-cap at given logits, 1 - (z / c)^2; in their place."""
        return z.div_(self.softcap).square_().neg_().add_(1)


def capped_(z: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """c tanh(s z / c) in place of a head's outputs z."""
    if logit_scale != 1:
        z *= logit_scale
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


@dataclass(frozen=True, eq=False)
class TopK:
    """A model's k most probable tokens, with a rule for the other entries.

    Args:
        ids: their ids, (N, k).
        log_probs: their log-probabilities, (N, k).
        tail: where the remaining mass goes: "renorm", to the k tokens, in proportion; "uniform", to all other entries
            alike; "student", to the other entries in proportion to the student's p.

    Raises:
        InputError: shapes or types that do not fit, or an unknown tail.

    Example:
        >>> known = TopK(torch.tensor([[0, 2]]), torch.tensor([[0.6, 0.3]]).log(), "uniform")
        >>> known.logits(slice(0, 1), torch.zeros(1, 4)).exp()
        tensor([[0.6000, 0.0500, 0.3000, 0.0500]])
    """

    ids: Int[Tensor, "N k"]
    log_probs: Float[Tensor, "N k"]
    tail: Literal["renorm", "uniform", "student"] = "renorm"

    def __post_init__(self):
        if not isinstance(self.ids, Tensor) or not isinstance(self.log_probs, Tensor) or self.ids.is_floating_point():
            raise InputError("TopK: ids must be an integer tensor (N, k), and log_probs a tensor (N, k)")
        if self.ids.shape != self.log_probs.shape or self.ids.ndim != 2:
            shapes = f"{tuple(self.ids.shape)} and {tuple(self.log_probs.shape)}"
            raise InputError(f"TopK: ids and log_probs must both be (N, k), got {shapes}")
        if self.tail not in ("renorm", "uniform", "student"):
            raise InputError(f"TopK: tail must be 'renorm', 'uniform' or 'student', got {self.tail!r}")

    def __repr__(self) -> str:
        rows, k = self.ids.shape
        return f"<TopK: {rows} rows of {k} tokens, tail {self.tail!r}>"

    def check_values(self, name: str) -> None:
        """Check that every row has distinct ids and valid log-probabilities.

        Raises:
            InputError: an id occurs twice, or log-probabilities are NaN, above 0 or of more mass than 1; the row is named.
        """
        ids, limit = self.ids.long().sort(-1).values, 1 + max(1e-3, 4 * torch.finfo(self.log_probs.dtype).eps)
        mass = self.log_probs.double().exp().sum(-1)
        for wrong, problem in (
            ((ids[:, 1:] == ids[:, :-1]).any(-1), "names an id twice"),
            (mass.isnan(), "holds NaN"),
            (
                mass > limit,
                "has probabilities that add up to more than 1: give log-probabilities, logits.log_softmax(-1)",
            ),
        ):
            if bool(wrong.any()):
                raise InputError(f"{name}: row {int(wrong.nonzero()[0, 0])} of TopK {problem}")

    def logits(self, rows: slice, student: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """Log-probabilities over the whole vocabulary for some rows, up to a constant."""
        ids, top_log_probs = self.ids[rows].long(), self.log_probs[rows].to(student.dtype)
        if self.tail == "renorm":
            log_probs = torch.full_like(student, -torch.inf)
        else:
            log_rest = torch.log1p(-top_log_probs.exp().sum(-1, keepdim=True).clamp(max=1))
            tail = student if self.tail == "student" else torch.zeros_like(student)
            log_probs = log_softmax(tail.scatter(-1, ids, -torch.inf)) + log_rest
        return log_probs.scatter_(-1, ids, top_log_probs)
