"""Rule on normalisation: logits are normalised over the vocabulary once, by torch's functions or by hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qlens.conformance.harness import Specimen
from qlens.conformance.rules.normalisation import normalised_otherwise
from qlens.conformance.rules.rule import Failed, NotApplicable, Remark, rule
from qlens.core.errors import InputError

SUM = 1e-2  # how far the sum of probabilities may be from 1: they may be in bfloat16
LOGITS = ("cross_entropy", "softmax", "log_softmax", "logsumexp")  # functions that take logits
LOG_PROBABILITIES = ("nll_loss", "kl_div")


@rule("another loss than the functions' names say is silently trained", compares=False)
def functions(loss: Specimen) -> str:
    """torch's functions get the inputs they expect, and a handwritten loss is a function of one softmax."""
    with _CallRecorder(loss.vocabulary) as recorder:
        try:
            loss.read(loss.tokens())
        except InputError as error:
            raise NotApplicable(f"it cannot be watched: {error}") from error
    if recorder.wrong:
        raise Failed("; ".join(dict.fromkeys(recorder.wrong)))
    if (finding := normalised_otherwise(loss)) is not None:
        evidence, state, consequence = finding
        raise Failed(evidence, consequence) if state is Failed else Remark(evidence)
    if not recorder.called:
        raise NotApplicable("it calls no softmax, cross-entropy or divergence of torch")
    return f"logits and log-probabilities where they belong: {', '.join(dict.fromkeys(recorder.called))}"


class _CallRecorder(TorchFunctionMode):
    """Records wrong arguments of torch's functions of distributions over the vocabulary.

    Attributes:
        called: names of the functions called.
        wrong: a sentence for each wrong argument.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.called: list[str] = []
        self.wrong: list[str] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in (*LOGITS, *LOG_PROBABILITIES):
            self._look(name, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, name: str, args: tuple, kwargs: dict) -> None:
        tensor = kwargs.get("input", args[0] if args else None)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim < 2:
            return
        dim = _dimension(name, args, kwargs, tensor)
        if dim is None or tensor.shape[dim] != self.vocabulary:
            return
        self.called.append(name)
        tensor = tensor.detach()
        if _are_probabilities(tensor, dim):
            if name in LOGITS:
                self.wrong.append(f"{name} is given probabilities, where it takes logits: a softmax of a softmax")
            else:
                self.wrong.append(f"{name} is given probabilities, where it takes log-probabilities")
        elif name in LOG_PROBABILITIES and bool((tensor > SUM).any(dim).all()):
            self.wrong.append(f"{name} is given entries above 0, where it takes log-probabilities: are these logits?")
        if name == "kl_div" and _flag(args, kwargs):
            target = kwargs.get("target", args[1] if len(args) > 1 else None)
            if isinstance(target, Tensor) and _are_probabilities(target.detach(), dim):
                self.wrong.append(
                    "kl_div is given probabilities as a target, where log_target=True takes their logarithms"
                )


def _are_probabilities(tensor: Tensor, dim: int) -> bool:
    return bool((tensor >= 0).all()) and bool(((tensor.sum(dim, dtype=torch.float64) - 1).abs() <= SUM).all())


def _dimension(name: str, args: tuple, kwargs: dict, tensor: Tensor) -> int | None:
    """The dimension of the distributions that a function takes."""
    if name in ("cross_entropy", "nll_loss"):
        return 1
    if name == "kl_div":
        return -1
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    return dim if isinstance(dim, int) and -tensor.ndim <= dim < tensor.ndim else None


def _flag(args: tuple, kwargs: dict) -> bool:
    """Whether kl_div is told that its target is in logarithms."""
    return bool(kwargs.get("log_target", args[5] if len(args) > 5 else False))
