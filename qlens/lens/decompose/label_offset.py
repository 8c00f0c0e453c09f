"""Label offset: losses that train every position on the label of another position of its text."""

from collections.abc import Callable

from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.numerics import spread
from qlens.core.tokens import Tokens
from qlens.lens.rounding import TOLERANCE

TRIED = 6  # tokens whose label is changed, one at a time


def label_offset(loss: Callable[[Tokens], Tensor], tokens: Tokens, before: Tensor, noise: Tensor) -> int:
    """The number of places between a token's own label and the label that it is trained on; 0 if they are the same or it varies.

    Args:
        loss: an unreduced loss, tokens -> (N,).
        tokens: where to try it, with sequences.
        before: its gradient, (N, V).
        noise: rounding error of every row, (N,).
    """
    if tokens.sequence is None:
        return 0
    offsets = set()
    for row in spread(len(tokens), TRIED).tolist():
        labels = tokens.labels.clone()
        labels[row] = (labels[row] + 1) % tokens.logits.shape[1]
        after = gradient(loss, tokens.replace(labels=labels))
        off = (after - before).double().norm(dim=-1)
        changed_rows = (off > TOLERANCE * before.double().norm(dim=-1) + 2 * noise).nonzero()[:, 0].tolist()
        if len(changed_rows) > 1 or (changed_rows and tokens.sequence[changed_rows[0]] != tokens.sequence[row]):
            return 0
        text = (tokens.sequence == tokens.sequence[row]).nonzero()[:, 0].tolist()
        offsets |= {text.index(row) - text.index(other) for other in changed_rows}
    return offsets.pop() if len(offsets) == 1 else 0
