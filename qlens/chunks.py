"""Chunks: a few rows of logits that turn into p and into a gradient where they lie."""

from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qlens.target import Target
from qlens.tokens import Tokens, log_softmax

CACHED = 2**20  # entries on which dense methods work at a time, so that their many passes stay near the processor


def softmax_(z: Float[Tensor, "n V"], labels: Int[Tensor, "n 1"]) -> tuple[Tensor, Tensor]:
    """p in place of the logits; returns log p_y and log(1 - p_y), (n,), which keep their digits at both ends."""
    size, found = max(1, CACHED // z.shape[1]), []
    for rows, label in zip(z.split(size), labels.split(size), strict=True):  # all of it while the rows are still near
        at_label, top = rows.gather(1, label)[:, 0], rows.amax(-1)
        torch.softmax(rows, -1, out=rows)
        log_z = top - rows.amax(-1).log()  # the top's p is at least 1 / V: no digits are lost
        p_y = rows.gather(1, label)
        rest = rows.scatter_(1, label, 0.0).sum(-1)
        rows.scatter_(1, label, p_y)
        found.append((at_label - log_z, rest.log().clamp(min=-1e30)))
    log_p, rest = (torch.cat(values) for values in zip(*found, strict=True))
    return log_p, rest


class Chunk(Tokens):
    """Tokens without a graph: what is asked for again is not computed again."""

    @property
    def log_probs(self) -> Float[Tensor, "n V"]:
        """log p, (n, V)."""
        return self._log_probs

    @cached_property
    def _log_probs(self) -> Float[Tensor, "n V"]:
        return log_softmax(self.logits)


def grad_(z: Float[Tensor, "n V"], tokens: Chunk, target: Target) -> Float[Tensor, " n"]:
    """g' in place of the logits, without the detour over Q where the target says what it is made of; returns a in g = a g'."""
    labels, ones = tokens.labels[:, None], torch.ones_like(target.scale)
    if target.pushed is not None:
        rest = tokens.rest_log_probs.exp()
        torch.exp(tokens.log_probs, out=z).scatter_(1, labels, -rest[:, None])
        return target.pushed
    if target.named is None:
        z.copy_(target.grad)
        return ones
    t = target.trust[:, None]
    torch.exp(tokens.log_probs, out=z)
    if target.named == "student":
        z.mul_(t)
    elif target.named == "uniform":
        z.sub_((1 - t) / z.shape[1])
    else:
        z.addcmul_(target.named, t - 1)
    z.scatter_add_(1, labels, -t)
    return target.scale
