"""Label weights -g_y / (1 - p_y) of a gradient, on the tokens where they are known, and gradients on changed tokens."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.losses.user_code import first_line

OPEN = 1e-9  # least 1 - p_y at which a label weight is read


def label_weights(grad: Float[Tensor, "N V"], tokens: Tokens) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """The label weight of every token in float64, (N,), and where 1 - p_y is large enough to read it; 0 elsewhere.

    Args:
        grad: logit gradients of the unreduced loss, (N, V).
        tokens: the tokens that they belong to.

    Example:
        >>> import qlens
        >>> t = qlens.probes()
        >>> weights, known = label_weights(qlens.get("dft").target(t).grad, t)
        >>> bool((weights - t.label_probs)[known].abs().max() < 1e-6)
        True
    """
    exact = tokens.with_precision(torch.float64)
    rest = exact.rest_log_probs.exp()
    known = rest > OPEN
    return torch.where(known, -exact.gather(grad.double()) / rest.clamp(min=1e-300), 0.0), known


def trial_gradient(loss: Callable[[Tokens], Tensor], tokens: Tokens) -> Float[Tensor, "N V"]:
    """The gradient of an unreduced loss, in float64, on tokens that it may not be written for.

    Raises:
        InputError: the loss raised an error; it is named.
    """
    try:
        return gradient(loss, tokens).double()
    except Exception as error:  # a loss may be made for its own tokens
        raise InputError(f"{type(error).__name__}: {first_line(error)[:100]}") from error
