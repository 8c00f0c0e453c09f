"""In-place softmax and gradient kernels for one chunk of logits."""

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qlens.core.numerics import expectation, log_softmax, precision
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.engine.heads import Head
from qlens.registry.structure import GeometricMixture

CACHED = 2**20  # entries worked on at a time, so that the passes over them stay near the processor


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of every tensor, as many as stay near the processor."""
    size = max(1, CACHED // tensors[0].shape[1])
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def normalise_(z: Float[Tensor, "n V"], out: Float[Tensor, "n V"] | None = None) -> Float[Tensor, "n 1"]:
    """softmax(z) in place of z, or in ``out``; returns log sum_k exp z_k, whose digits survive however peaked the row."""
    out = z if out is None else out
    top = z.amax(-1, keepdim=True)
    torch.softmax(z, -1, out=out)
    return top - out.amax(-1, keepdim=True).log()  # the top's p is at least 1 / V


def others_(z: Float[Tensor, "n V"], labels: Int[Tensor, "n 1"]) -> tuple[Tensor, Tensor]:
    """p_{-y} - d in place of the logits; returns log p_y and log(1 - p_y), (n,), which keep their digits at both ends.

    p - d = (1 - p_y)(p_{-y} - d), and the factor of a whole row is the caller's to fold in where it costs nothing.
    """
    found = []
    for rows, label in blocks(z, labels):  # all of it while the rows are still near
        at_label = rows.gather(1, label)
        rest = normalise_(rows.scatter_(1, label, torch.finfo(z.dtype).min))  # no -inf: the label may stand alone
        rows.scatter_(1, label, -1.0)
        log_z = torch.logaddexp(at_label, rest)
        found.append(torch.cat([at_label - log_z, (rest - log_z).clamp(min=-1e30)], 1))
    log_p, rest = torch.cat(found).unbind(1)
    return log_p, rest


def mix_(
    z: Float[Tensor, "n V"],
    y: Float[Tensor, "n V"],
    labels: Int[Tensor, "n 1"],
    mixture: GeometricMixture,
    told: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    r"""p - t d - (1 - t) r in place of the student's logits, for a mixture's r; returns s and the loss of every row, (n,).

    ``y`` are the other model's logits and are used up; ``told`` gives t and s, (n,), for log p_y and log(1 - p_y).
    """
    at_label, r = z.gather(1, labels), torch.empty_like(y)
    mixture.logits_(y, z)
    if mixture.value != "cross_entropy":
        log_r = normalise_(y, out=r)[:, 0]
        far = expectation(r, y.sub_(z)) - log_r
    else:
        torch.softmax(y, -1, out=r)
        far = -expectation(r, z)
    log_z = normalise_(z)
    log_p, p_y, r_y = at_label - log_z, z.gather(1, labels), r.gather(1, labels)
    rest = z.scatter_(1, labels, 0.0).sum(-1, keepdim=True)
    t, s = told(log_p[:, 0], rest.log().clamp(min=-1e30)[:, 0])
    loss = _split(t, log_p[:, 0], far + log_z[:, 0])
    t = t[:, None]
    z.addcmul_(r, t - 1)
    z.scatter_(1, labels, (1 - t) * (p_y - r_y) - t * rest)  # p_y - t - (1 - t) r_y without its cancellation
    return s, s * loss


def smooth_(
    z: Float[Tensor, "n V"],
    labels: Int[Tensor, "n 1"],
    mixture: GeometricMixture,
    told: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    r"""p - t d in place of the logits, for a mixture's uniform part u; returns s, 1 - t and the losses, (n,).

    What is left of p - t d - (1 - t) u is the same on every entry, and ``Flat`` adds it without a pass over them. ``told`` as in
    ``mix_``.
    """
    at_label, found = z.gather(1, labels)[:, 0], []
    for rows, label in blocks(z, labels):
        along = rows.mean(-1)
        log_p, rest = others_(rows, label)
        rows.mul_(rest.exp()[:, None])
        found.append(torch.stack([along, log_p, rest]))
    along, log_p, rest = torch.cat(found, 1)
    t, s = told(log_p, rest)
    z.scatter_(1, labels, ((1 - t) * log_p.exp() - t * rest.exp())[:, None])  # p_y - t without its cancellation
    far = at_label - log_p - along - (math.log(z.shape[1]) if mixture.value != "cross_entropy" else 0.0)
    far = far.masked_fill(along == -torch.inf, torch.inf)  # an impossible token, the label too: no inf - inf
    return s, 1 - t, s * _split(t, log_p, far)


class Flat:
    """A part of the logit gradients that is one number for a whole row, on its way to hidden states, head and bias."""

    def __init__(self, head: Head):
        wide = precision(head.weight.dtype)
        self.column = head.weight.sum(0, dtype=wide)
        self.head = torch.zeros(1, head.weight.shape[1], dtype=wide, device=head.weight.device)
        self.bias = self.head.new_zeros(())

    def sub_(
        self, c: Float[Tensor, "n 1"], hidden: Float[Tensor, "n H"], d_hidden: Float[Tensor, "n H"] | None
    ) -> None:
        """Take a row's number c from all its entries."""
        self.head -= c.T @ hidden
        self.bias -= c.sum()
        if d_hidden is not None:
            d_hidden.addcmul_(c, self.column, value=-1)


def _split(t: Float[Tensor, " n"], log_p: Float[Tensor, " n"], far: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """t times the label's loss and 1 - t times the rest's; a share of 0 ignores even an infinite loss."""
    return torch.where(t == 0, 0.0, -t * log_p) + torch.where(t == 1, 0.0, (1 - t) * far)


class Chunk(Tokens):
    """Tokens without a graph, which compute log p once; a copy with other logits is plain ``Tokens`` and has no cache."""

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
