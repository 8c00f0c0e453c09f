"""Tokens: the inputs of a loss at N supervised positions."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.numerics import log_softmax, one_hot, precision
from qlens.core.tokens.display import Display
from qlens.core.tokens.fields import check_labels, check_logits, check_shape, checked_field

MODELS = ("reference", "teacher", "old", "second")
PER_TOKEN = ("sequence", "weight", "critical", "advantage", "hint", "chosen", "pair")
KEPT = 2**22  # logits up to which probabilities are kept
P = ParamSpec("P")
R = TypeVar("R")


def kept(compute: Callable[P, R]) -> Callable[P, R]:
    """A method of ``Tokens`` that ``Tokens.cached`` computes once."""

    @functools.wraps(compute)
    def get(*args: P.args, **kwargs: P.kwargs) -> R:
        cache = args[0].cache  # pyright: ignore[reportAttributeAccessIssue]
        if cache is None:
            return compute(*args, **kwargs)
        key = (compute.__name__, *args[1:])
        if key not in cache:
            cache[key] = compute(*args, **kwargs)
        return cache[key]

    return get


@dataclass(frozen=True, eq=False, repr=False)
class Tokens(Display):
    r"""Logits and labels at N supervised positions, with the other inputs of a method.

    Args:
        logits: the student's logits z, (N, V). No NaN, no +inf; -inf marks an impossible token.
        labels: the observed tokens y, ids (N,). -100 is refused: ``qlens.core.supervised`` removes it.
        reference, teacher, old, second: logits (N, V) of other forward passes, constants to every method.
        sequence: ids of the sequences, (N,).
        weight: factor of loss and scale, (N,).
        critical, hint: masks, (N,).
        advantage: advantages of a policy gradient, (N,).
        chosen: whether a token is of the chosen text of its pair, (N,).
        pair: ids of the pairs, (N,).
        negatives: mask of tokens that should be unlikely, (N, V).

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

    checked = False  # whether the values were checked when the tokens were made
    cache = None  # results of ``cached`` tokens by name

    def __post_init__(self):
        object.__setattr__(self, "checked", True)
        for name, value in self.fields().items():
            object.__setattr__(self, name, _outside_inference(value))
        self._check({"logits": self.logits, "labels": self.labels, **self.fields()})

    @classmethod
    def unchecked(cls, **fields: Tensor) -> "Tokens":
        """Tokens of fields that have been checked already, without a pass over the logits."""
        tokens = object.__new__(cls)
        tokens.__dict__.update({name: fields.get(name) for name in cls.__dataclass_fields__})
        return tokens

    @classmethod
    def from_text(cls, model: Any, tokenizer: Any, rows: Any, teacher: Any = None, reference: Any = None) -> "Tokens":
        """Tokens at every supervised position of texts, of prompt/completion pairs, or of rows of data.

        Args:
            model: a causal language model, or its path.
            tokenizer: its tokenizer.
            rows: texts, (prompt, completion) pairs, whose completions are supervised, or data as ``qlens.encode`` takes them
                (dicts, a ``datasets.Dataset``, a path).
            teacher, reference: other models, or their paths.

        See ``qlens.data.from_text.tokens_from_text`` for the options.

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
        """The fields that are not None, by name."""
        values = self.__dict__
        return {name: values[name] for name in self.__dataclass_fields__ if values[name] is not None}

    def replace(self, **changes: Any) -> "Tokens":
        """A copy with some fields changed (None removes one); only these are checked.

        Raises:
            InputError: an unknown field, or a value that does not fit.
        """
        unknown = [name for name in changes if name not in self.__dataclass_fields__]
        if unknown:
            raise InputError(
                f"Tokens has no field {unknown[0]!r}; its fields are {', '.join(self.__dataclass_fields__)}"
            )
        changes = {name: _outside_inference(value) for name, value in changes.items()}
        tokens = Tokens.unchecked(**{**self.fields(), **changes})
        if changes.get("logits") is not None and changes["logits"].shape != self.logits.shape:
            changes = tokens.fields()  # all fields must fit the new shape
        tokens._check({name: value for name, value in changes.items() if value is not None})
        return tokens

    def with_logits(self, logits: Float[Tensor, "N V"]) -> "Tokens":
        """A copy with the same logits in another dtype or with a graph, unchecked."""
        return Tokens.unchecked(**{**self.fields(), "logits": logits})

    @kept
    def unweighted(self) -> "Tokens":
        """The same tokens without weights."""
        if self.weight is None:
            return self
        tokens = Tokens.unchecked(**{**self.fields(), "weight": None})
        return tokens if self.cache is None else tokens.cached()

    def cached(self) -> "Tokens":
        """The same tokens without gradient, whose probabilities are computed once for many methods, in place of anew."""
        tokens = Tokens.unchecked(**{**self.fields(), "logits": self.logits.detach()})
        tokens.__dict__["cache"] = {}
        return tokens

    def in_float64(self) -> "Tokens":
        """The same tokens in float64, ``cached`` unless they are many."""
        tokens = self.with_precision(torch.float64)
        return tokens if tokens.cache is not None or tokens.logits.numel() > KEPT else tokens.cached()

    def copied(self) -> "Tokens":
        """A deep copy, differentiable, for user methods that may write to their inputs."""
        return Tokens.unchecked(**{name: value.clone() for name, value in self.fields().items()})

    def upcast(self) -> "Tokens":
        """The same tokens with every model's logits in float32 at least, differentiable."""
        models = {name: value for name, value in self.fields().items() if name in ("logits", *MODELS)}
        changed = {name: value.to(precision(value.dtype)) for name, value in models.items()}
        if all(changed[name] is models[name] for name in models):
            return self
        return Tokens.unchecked(**{**self.fields(), **changed})

    def with_precision(self, dtype: torch.dtype) -> "Tokens":
        """The same tokens with every model's logits in another dtype."""
        models = {name: value for name, value in self.fields().items() if name in ("logits", *MODELS)}
        changed = {name: value.to(dtype) for name, value in models.items() if value.dtype != dtype}
        return self.replace(**changed) if changed else self

    def require(self, name: str) -> Tensor:
        """The field ``name``.

        Raises:
            InputError: it is None.
        """
        value = getattr(self, name)
        if value is None:
            raise InputError(f"{name} is missing: this method needs Tokens({name}=...)")
        return value

    def _check(self, fields: dict[str, Tensor]) -> None:
        """Check fields against the logits.

        Raises:
            InputError: naming the field, its shape or value, and what would be right.
        """
        if "logits" in fields:
            check_logits("logits", self.logits)
        shape = tuple(self.logits.shape)
        if "labels" in fields:
            check_labels(self.labels, shape)
            object.__setattr__(self, "labels", self.labels.long())
        for name, value in fields.items():
            if name in MODELS:
                check_logits(name, value)
                check_shape(name, value, shape)
            elif name in PER_TOKEN:
                object.__setattr__(self, name, checked_field(name, value, shape[:1]))
            elif name == "negatives":
                object.__setattr__(self, name, checked_field(name, value, shape))

    @property
    @kept
    def log_probs(self) -> Float[Tensor, "N V"]:
        """log p, differentiable, in float32 at least."""
        return log_softmax(self.logits)

    @property
    @kept
    def probs(self) -> Float[Tensor, "N V"]:
        """p = softmax(z), differentiable."""
        return self.log_probs.exp()

    @property
    @kept
    def label_log_probs(self) -> Float[Tensor, " N"]:
        """log p_y, differentiable."""
        return self.gather(self.log_probs)

    @property
    @kept
    def label_probs(self) -> Float[Tensor, " N"]:
        """p_y, differentiable."""
        return self.label_log_probs.exp()

    @property
    @kept
    def rest_log_probs(self) -> Float[Tensor, " N"]:
        """log(1 - p_y), differentiable, summed over the other tokens so that it keeps its digits as p_y -> 1.

        Finite (-1e30) where the label is the only possible token.
        """
        return self.rest_of(self.log_probs)

    @property
    @kept
    def rest(self) -> Float[Tensor, " N"]:
        """1 - p_y, summed over the other tokens, differentiable."""
        return self.log_probs.exp().scatter(-1, self.labels[:, None].long(), 0.0).sum(-1)

    @property
    @kept
    def label_grad(self) -> Float[Tensor, "N V"]:
        """p - d, the gradient of -log p_y, without gradient; -(1 - p_y) at the label, summed over the other tokens."""
        return self.probs.detach().scatter(-1, self.labels[:, None].long(), -self.rest.detach()[:, None])

    @property
    @kept
    def others(self) -> Float[Tensor, "N V"]:
        """p_{-y}: p without the label, renormalised; 0 at the label and in rows where p_y = 1; without gradient."""
        rest = self.log_probs.detach().scatter(-1, self.labels[:, None].long(), -torch.inf)
        return torch.where(rest.amax(-1, keepdim=True) > -torch.inf, log_softmax(rest).exp(), 0.0)

    @property
    @kept
    def one_hot(self) -> Float[Tensor, "N V"]:
        """d, the one-hot of the label."""
        return one_hot(self.labels, self.logits.shape[-1], precision(self.logits.dtype))

    def gather(self, values: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """The label's entry in every row."""
        return values.gather(-1, self.labels[:, None].long())[:, 0]

    def rest_of(self, log_probs: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """``rest_log_probs`` of log-probabilities that are already there."""
        return log_probs.scatter(-1, self.labels[:, None].long(), -torch.inf).clamp(min=-1e30).logsumexp(-1)

    @kept
    def log_probs_of(self, model: str) -> Float[Tensor, "N V"]:
        """Another model's log-probabilities (``reference``, ``teacher``, ``old``, ``second``), without gradient."""
        return log_softmax(self.require(model).detach()).to(precision(self.logits.dtype))


def _outside_inference(value: Any) -> Any:
    """A copy that autograd may use of a tensor made under ``torch.inference_mode()``; other values as they are."""
    if not isinstance(value, Tensor) or not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()
