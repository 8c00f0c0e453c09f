"""Autograd: gradients that are taken whatever mode the caller is in, torch.no_grad or torch.inference_mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlens.tokens import Tokens


@contextmanager
def recorded() -> Iterator[None]:
    """Inside, torch records gradients, though the caller switched them off.

    Example:
        >>> with torch.inference_mode(), recorded():
        ...     torch.zeros(1, requires_grad=True).exp().requires_grad
        True
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def ordinary(tokens: Tokens) -> Tokens:
    """The tokens with copies of what was made under torch.inference_mode, which autograd refuses; outside that mode."""
    copies = {name: value.clone() for name, value in tokens.fields().items() if value.is_inference()}
    return Tokens.unchecked(**{**tokens.fields(), **copies}) if copies else tokens
