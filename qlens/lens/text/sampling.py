"""Sampling: the tokens of a long text that stand for all of them."""

import torch
from jaxtyping import Int
from torch import Tensor

from qlens.core.numerics import row_blocks, spread
from qlens.core.tokens import Tokens

WHOLE = 2**21  # logits up to which all tokens are analysed
FEWEST = 8  # tokens that are taken at any vocabulary


def rows_over_p(tokens: Tokens, most: int, entries: int) -> Int[Tensor, " n"]:
    """Rows evenly spread over the ranks of p_y, in order.

    Args:
        tokens: the text.
        most: number of rows at most.
        entries: logits of all rows at most, as long as there are ``FEWEST`` rows.

    Example:
        >>> from qlens.testing import random_tokens
        >>> len(rows_over_p(random_tokens(40, 30), most=10, entries=10_000))
        10
    """
    rows, vocabulary = tokens.logits.shape
    with torch.no_grad():
        p = torch.cat([tokens[block].label_log_probs for block in row_blocks(rows, vocabulary)])
    number = max(FEWEST, min(most, entries // vocabulary))
    return p.argsort()[spread(rows, number).to(p.device)].sort().values
