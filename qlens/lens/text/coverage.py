"""Coverage: the tokens of a long text on which a loss was analysed, and those on which the findings were confirmed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from qlens.core.display import enumeration
from qlens.lens.text.figures import Figures


@dataclass(frozen=True, eq=False)
class TextCoverage:
    """What of a text was analysed and confirmed.

    Args:
        rows: the tokens that were analysed, (n,).
        tokens: number of tokens.
        figures: the figures of every token.
        dtype: of the logits as they were read.
        confirmed: the findings that were compared on every token, in words.
        exceptions: the tokens on which they do not hold, (m,).
        near: number of tokens with the gradient of the near match; None where there is none, or it was not compared.
        excluded: number of tokens that a threshold excludes or a clip reaches, by part of the mixture.
    """

    rows: Int[Tensor, " n"]
    tokens: int
    figures: Figures
    dtype: torch.dtype
    confirmed: tuple[str, ...] = ()
    exceptions: Int[Tensor, " m"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    excluded: Mapping[str, int] = field(default_factory=dict)
    near: int | None = None

    def __str__(self) -> str:
        some, all_tokens = len(self.rows), self.tokens
        near = (
            "" if self.near is None else f" The near match holds on {self.near} of the {all_tokens} tokens, up to 1 %."
        )
        if not self.confirmed:
            rest = "the table holds all of them."
        else:
            verb = "were" if len(self.confirmed) > 1 else "was"
            rest = f"{enumeration(self.confirmed)} {verb} compared on all of them."
        return f"Your text: analysed on {some} of {all_tokens} tokens, spread over p_y; {rest}{near}"
