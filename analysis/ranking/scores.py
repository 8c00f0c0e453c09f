"""Scores: the few numbers of every token that its rank follows from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from qlens.analysis.token_view.summary import negative_margin
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import Variant

OF_MODELS = ("label", "p_y", "p_other", "runner_up", "p_runner_up", "negative_margin")
OF_METHODS = ("q_y", "label_weight", "q_other", "label_gradient")


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of N tokens.

    Args:
        models: a line per token: row (number in the data), position (from 1), and ``OF_MODELS``; label and runner_up are ids.
        methods: by spec, a line per token with ``OF_METHODS``, in unit scale.
    """

    models: pd.DataFrame
    methods: Mapping[str, pd.DataFrame]

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray], specs: Sequence[str]) -> "Scores":
        """Scores of the columns that ``token_columns`` returns, with ``row`` and ``position``."""
        models = pd.DataFrame({name: columns[name] for name in ("row", "position", *OF_MODELS)})
        methods = {
            spec: pd.DataFrame({name: columns[f"{name} {number}"] for name in OF_METHODS})
            for number, spec in enumerate(specs)
        }
        return cls(models, methods)


class _Chunk(Tokens):
    """Tokens whose log p is known."""

    @property
    def log_probs(self) -> Float[Tensor, "N V"]:
        """log p, in float32 at least."""
        return self.__dict__["log_p"]


def token_columns(tokens: Tokens, variants: Sequence[Variant]) -> dict[str, np.ndarray]:
    """The scores of a chunk of tokens: ``OF_MODELS``, and ``OF_METHODS`` with the number of the method, in 32 bits.

    Args:
        tokens: (n, V) with the fields that the methods need; whole sequences for methods of that scope.
        variants: M methods with different specs.

    Example:
        >>> import qlens, torch
        >>> tokens = Tokens(logits=torch.tensor([[0.0, 1.0, 2.0]]), labels=torch.tensor([1]))
        >>> token_columns(tokens, [qlens.get("sft")])["q_y 0"]
        array([1.], dtype=float32)
    """
    chunk = _Chunk.unchecked(**tokens.fields())
    object.__setattr__(chunk, "checked", tokens.checked)
    first = Target.push(chunk, 1.0)
    log_p = chunk.__dict__["log_p"] = first.log_probs
    margin, runner_up, p_runner_up = negative_margin(chunk, log_p)
    if chunk.teacher is not None:
        margin = margin.minimum(negative_margin(chunk, chunk.log_probs_of("teacher"))[0])
    columns = {
        "label": chunk.labels,
        "p_y": chunk.label_probs,
        "p_other": first.rest,
        "runner_up": runner_up,
        "p_runner_up": p_runner_up,
        "negative_margin": margin,
    }
    for number, variant in enumerate(variants):
        target = variant.target(chunk).with_sums_of(first).at("unit").with_sums_of(first)
        of_method = {"q_y": target.q_y, "label_weight": target.label_weight, "label_gradient": target.pull}
        of_method["q_other"] = target.rest - target.pull
        columns |= {f"{name} {number}": values for name, values in of_method.items()}
    return {name: _array(values) for name, values in columns.items()}


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy().astype(np.float32 if values.is_floating_point() else np.int32)
