"""Tokens: everything a loss may look at, at N supervised positions."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.token_fields import check_labels, check_logits, check_shape, checked_field

MODELS = ("reference", "teacher", "old", "second")
BLOCK_ENTRIES = 2**18  # entries worked on at a time, so that passes over them stay in the cache
PER_TOKEN = ("sequence", "weight", "critical", "advantage", "hint", "chosen", "pair")


@dataclass(frozen=True, eq=False)
class Tokens:
    r"""Logits and labels at N supervised positions, with whatever else a method asks for.

    Args:
        logits: the student's logits z, (N, V). No NaN, no +inf; -inf marks an impossible token.
        labels: the observed tokens y, (N,). -100 is refused: ``qlens.core.supervised`` removes it.
        reference, teacher, old, second: other passes' logits, (N, V); constants to every method.
        sequence: the id of the sequence each position belongs to, (N,).
        weight: multiplies loss and scale, (N,).
        critical, hint, chosen: masks, (N,); ``advantage``: (N,); ``pair``: ids of pairs, (N,).
        negatives: candidate tokens to push down, (N, V).

    Raises:
        InputError: shapes, dtypes, labels or values that do not fit.

    Example:
        >>> import torch
        >>> tokens = Tokens(logits=torch.zeros(2, 3), labels=torch.tensor([0, 2]))
        >>> tokens.label_probs
        tensor([0.3333, 0.3333])
    """

    logits: Float[Tensor, "N V"]
    labels: Int[Tensor, " N"]
    reference: Float[Tensor, "N V"] | None = None
    teacher: Float[Tensor, "N V"] | None = None
    old: Float[Tensor, "N V"] | None = None
    second: Float[Tensor, "N V"] | None = None
    sequence: Int[Tensor, " N"] | None = None
    weight: Float[Tensor, " N"] | None = None
    critical: Bool[Tensor, " N"] | None = None
    advantage: Float[Tensor, " N"] | None = None
    hint: Bool[Tensor, " N"] | None = None
    chosen: Bool[Tensor, " N"] | None = None
    pair: Int[Tensor, " N"] | None = None
    negatives: Bool[Tensor, "N V"] | None = None

    checked = False  # whether all values were looked at when these were made

    def __post_init__(self):
        object.__setattr__(self, "checked", True)
        for name, value in self.fields().items():
            object.__setattr__(self, name, _outside_inference(value))
        self._check({"logits": self.logits, "labels": self.labels, **self.fields()})

    @classmethod
    def unchecked(cls, **fields: Tensor) -> "Tokens":
        """Tokens of fields that have been checked already: no pass over the logits, no wait for a device."""
        tokens = object.__new__(cls)
        for field in dataclasses.fields(cls):
            object.__setattr__(tokens, field.name, fields.get(field.name))
        return tokens

    @classmethod
    def from_text(cls, model: Any, tokenizer: Any, rows: Any, teacher: Any = None, reference: Any = None) -> "Tokens":
        """Tokens at every supervised position of texts, or of prompt/completion pairs.

        See ``qlens.data.from_text.tokens_from_text``.

        Example:
            >>> Tokens.from_text(model, tokenizer, [("2 + 2 =", "4")])  # doctest: +SKIP
        """
        from qlens.data.from_text import tokens_from_text

        return tokens_from_text(model, tokenizer, rows, teacher=teacher, reference=reference)

    def __len__(self) -> int:
        return self.logits.shape[0]

    def __getitem__(self, index: Any) -> "Tokens":
        """The chosen rows of every field: ``tokens[mask]``, ``tokens[2:5]``, ``tokens[[0, 0, 1]]``."""
        rows = Tokens.unchecked(**{name: value[index] for name, value in self.fields().items()})
        if rows.logits.ndim != 2:
            raise InputError(f"tokens[{index!r}] is no selection of rows: write tokens[i : i + 1], a list or a mask")
        return rows

    def fields(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def replace(self, **changes: Any) -> "Tokens":
        """A copy with the given fields changed, None for none; the others have been checked already."""
        unknown = [name for name in changes if name not in self.__dataclass_fields__]
        if unknown:
            raise InputError(
                f"Tokens has no field {unknown[0]!r}; its fields are {', '.join(self.__dataclass_fields__)}"
            )
        changes = {name: _outside_inference(value) for name, value in changes.items()}
        tokens = Tokens.unchecked(**{**self.fields(), **changes})
        if changes.get("logits") is not None and changes["logits"].shape != self.logits.shape:
            changes = tokens.fields()  # every other field has to fit the new shape
        tokens._check({name: value for name, value in changes.items() if value is not None})
        return tokens

    def with_logits(self, logits: Float[Tensor, "N V"]) -> "Tokens":
        """A copy with logits that hold what has been checked already, in another dtype or with a graph."""
        return Tokens.unchecked(**{**self.fields(), "logits": logits})

    def unweighted(self) -> "Tokens":
        """The same tokens without weights."""
        return self if self.weight is None else Tokens.unchecked(**{**self.fields(), "weight": None})

    def copied(self) -> "Tokens":
        """The same tokens on memory of their own, differentiable: for a method of a user's own, which may write on them."""
        return Tokens.unchecked(**{name: value.clone() for name, value in self.fields().items()})

    def upcast(self) -> "Tokens":
        """The same tokens with every model's logits in float32 at least, differentiable."""
        models = {name: value for name, value in self.fields().items() if name in ("logits", *MODELS)}
        changed = {name: value.to(precision(value.dtype)) for name, value in models.items()}
        return (
            self
            if all(changed[name] is models[name] for name in models)
            else Tokens.unchecked(**{**self.fields(), **changed})
        )

    def with_precision(self, dtype: torch.dtype) -> "Tokens":
        """The same tokens with every model's logits in another dtype."""
        models = {name: value for name, value in self.fields().items() if name in ("logits", *MODELS)}
        changed = {name: value.to(dtype) for name, value in models.items() if value.dtype != dtype}
        return self.replace(**changed) if changed else self

    def require(self, name: str) -> Tensor:
        """The field ``name``, or an error that says who lacks it."""
        value = getattr(self, name)
        if value is None:
            raise InputError(f"{name} is missing: this method needs Tokens({name}=...)")
        return value

    def _check(self, given: dict[str, Tensor]) -> None:
        """Refuse those of the given fields that do not fit the logits.

        Raises:
            InputError: naming the field, its shape or value, and what would be right.
        """
        if "logits" in given:
            check_logits("logits", self.logits)
        shape = tuple(self.logits.shape)
        if "labels" in given:
            check_labels(self.labels, shape)
            object.__setattr__(self, "labels", self.labels.long())
        for name in given:
            if name in MODELS:
                check_logits(name, given[name])
                check_shape(name, given[name], shape)
            elif name in PER_TOKEN:
                object.__setattr__(self, name, checked_field(name, given[name], shape[:1]))
            elif name == "negatives":
                object.__setattr__(self, name, checked_field(name, given[name], shape))

    @property
    def log_probs(self) -> Float[Tensor, "N V"]:
        """log p, differentiable, in float32 at least."""
        return log_softmax(self.logits)

    @property
    def probs(self) -> Float[Tensor, "N V"]:
        """p = softmax(z), differentiable."""
        return self.log_probs.exp()

    @property
    def label_log_probs(self) -> Float[Tensor, " N"]:
        """log p_y, differentiable."""
        return self.gather(self.log_probs)

    @property
    def label_probs(self) -> Float[Tensor, " N"]:
        """p_y, differentiable."""
        return self.label_log_probs.exp()

    @property
    def rest_log_probs(self) -> Float[Tensor, " N"]:
        """log(1 - p_y), differentiable: added up over the other tokens, so that it keeps its digits as p_y -> 1.

        Finite (-1e30) where the label is the only possible token.
        """
        return self.log_probs.scatter(-1, self.labels[:, None].long(), -torch.inf).clamp(min=-1e30).logsumexp(-1)

    @property
    def others(self) -> Float[Tensor, "N V"]:
        """p_{-y}: p with the label removed and renormalised, 0 at the label and where nothing is left; without gradient."""
        rest = self.log_probs.detach().scatter(-1, self.labels[:, None].long(), -torch.inf)
        return torch.where(rest.amax(-1, keepdim=True) > -torch.inf, log_softmax(rest).exp(), 0.0)

    @property
    def one_hot(self) -> Float[Tensor, "N V"]:
        """d, the one-hot of the label."""
        return one_hot(self.labels, self.logits.shape[-1], precision(self.logits.dtype))

    def gather(self, values: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """The label's entry in every row."""
        return values.gather(-1, self.labels[:, None].long())[:, 0]

    def log_probs_of(self, model: str) -> Float[Tensor, "N V"]:
        """Another model's log-probabilities (``reference``, ``teacher``, ``old``, ``second``), without gradient."""
        return log_softmax(self.require(model).detach()).to(precision(self.logits.dtype))


def _outside_inference(value: Any) -> Any:
    """A tensor made under ``torch.inference_mode()`` as one that autograd may use."""
    if not isinstance(value, Tensor) or not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()


def spread(number: int, most: int) -> Int[Tensor, " n"]:
    """Indices of at most so many of ``number`` rows, from the first to the last."""
    return torch.linspace(0, number - 1, min(number, most)).long().unique()


def precision(dtype: torch.dtype) -> torch.dtype:
    """The dtype that probabilities are computed in: float64 stays, everything else becomes float32."""
    return torch.promote_types(dtype, torch.float32)


def log_softmax(logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B V"]:
    """log p = z - logsumexp(z), in float32 at least: the house's only normalisation.

    On a CPU, torch sums the V terms of a float32 row one after another, so that log p is off by 4e-5 at V = 250,000. Here
    sum(p) = 1 up to 1e-6 at any V.
    """
    z = logits.to(precision(logits.dtype))
    if z.dtype == torch.float64 or z.device.type != "cpu":
        return torch.log_softmax(z, -1)
    return _LogSoftmax.apply(z)


SMALLEST = -80.0  # log of a share that adds nothing to 1; subnormal numbers, which are slow, are avoided


class _LogSoftmax(torch.autograd.Function):
    """z - max(z) - log sum exp(z - max(z)), some rows at a time, with sums that torch adds up pairwise."""

    @staticmethod
    def forward(ctx: Any, z: Float[Tensor, "*B V"]) -> Float[Tensor, "*B V"]:
        log_p, size = torch.empty_like(z, memory_format=torch.contiguous_format), z.shape[-1]
        step = max(1, BLOCK_ENTRIES // size)
        for few, made in zip(z.reshape(-1, size).split(step), log_p.view(-1, size).split(step), strict=True):
            torch.sub(few, few.amax(-1, keepdim=True), out=made)
            made.sub_(made.clamp(min=SMALLEST).exp_().sum(-1, keepdim=True).log_())
        ctx.save_for_backward(log_p)
        return log_p

    @staticmethod
    def backward(ctx: Any, *grads: Float[Tensor, "*B V"]) -> Float[Tensor, "*B V"]:
        (log_p,) = ctx.saved_tensors
        return torch.ops.aten._log_softmax_backward_data(grads[0], log_p, -1, log_p.dtype)


def one_hot(labels: Int[Tensor, "*B"], size: int, dtype: torch.dtype) -> Float[Tensor, "*B size"]:
    """One-hot rows of the given width."""
    zeros = torch.zeros(*labels.shape, size, dtype=dtype, device=labels.device)
    return zeros.scatter(-1, labels[..., None].long(), 1.0)


def expectation(probs: Float[Tensor, "N V"], values: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """sum_k probs_k values_k, where an exact zero ignores even an infinite value (0 log 0 = 0)."""
    made = _dot(probs, values)
    if bool(made.isfinite().all()):  # the masks cost more than the sum, and few rows need them
        return made
    return torch.where(probs == 0, 0.0, probs * values.masked_fill(probs == 0, 0.0)).sum(-1)


def kl(log_a: Float[Tensor, "N V"], log_b: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(a || b) = sum_k a_k (log a_k - log b_k) of log-distributions, differentiable in both; a_k = 0 adds nothing."""
    if bool((made := _dot(log_a.exp(), log_a - log_b)).isfinite().all()):
        return made
    gap = (log_a - log_b.masked_fill(log_a.detach() == -torch.inf, 0.0)).masked_fill(log_a.detach() == -torch.inf, 0.0)
    return (log_a.exp() * gap).sum(-1)


def _dot(a: Float[Tensor, "N V"], b: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """sum_k a_k b_k without a tensor of the products."""
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.linalg.vecdot(a.to(wide), b.to(wide))


def log_mix(log_a: Float[Tensor, "N V"], log_b: Float[Tensor, "N V"], share: float) -> Float[Tensor, "N V"]:
    """log(share a + (1 - share) b) of log-distributions, differentiable in both; -inf where both are."""
    first, second = (math.log(part) if part else -math.inf for part in (share, 1 - share))
    one, two = log_a + first, log_b + second
    neither = (one == -torch.inf) & (two == -torch.inf)
    mixed = torch.logaddexp(one.masked_fill(neither, 0.0), two.masked_fill(neither, 0.0))
    return mixed.masked_fill(neither, -torch.inf)
