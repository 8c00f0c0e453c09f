"""In-place softmax and gradient kernels for one chunk of logits."""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qlens.core.numerics import expectation, log_softmax, precision
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.engine.heads import Head
from qlens.engine.kernels.raw import raw_label_log_probs
from qlens.engine.kernels.raw_logits import RawLogits
from qlens.engine.row_inputs import tile_rows
from qlens.registry.structure import GeometricMixture


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching tiles of rows of every tensor, small enough to stay in a CPU's cache."""
    size = tile_rows(tensors[0].shape[1], tensors[0].device)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def normalise_(z: Float[Tensor, "n V"], out: Float[Tensor, "n V"] | None = None) -> Float[Tensor, "n 1"]:
    """softmax(z) in place of z, or in ``out``; returns log sum_k exp z_k, whose digits survive however peaked the row."""
    out = z if out is None else out
    top = z.amax(-1, keepdim=True)
    torch.softmax(z, -1, out=out)
    return top - out.amax(-1, keepdim=True).log()  # the top's p is at least 1 / V


def label_gradient_(z: Float[Tensor, "n V"] | RawLogits, labels: Int[Tensor, "n 1"]) -> tuple[Tensor, Tensor]:
    """p_{-y} - d in place of the logits; returns log p_y and log(1 - p_y), (n,), which keep their digits at both ends.

    p - d = (1 - p_y)(p_{-y} - d); the factor of a whole row is left to the caller, who folds it into smaller operands.
    """
    if isinstance(z, RawLogits):
        return raw_label_log_probs(z, labels[:, 0], write=True)
    tiles = []
    for rows, label in blocks(z, labels):  # all of it while the rows are cached
        at_label = rows.gather(1, label)
        rest = normalise_(rows.scatter_(1, label, torch.finfo(z.dtype).min))  # no -inf: the label may stand alone
        rows.scatter_(1, label, -1.0)
        log_z = torch.logaddexp(at_label, rest)
        tiles.append(torch.cat([at_label - log_z, (rest - log_z).clamp(min=-1e30)], 1))
    log_p, log_rest = torch.cat(tiles).unbind(1)
    return log_p, log_rest


class MixtureTerms(NamedTuple):
    """Of a chunk's rows: r, (n, V); log p_y, log(1 - p_y) and the loss toward r, (n,); p_y, r_y and 1 - p_y, (n, 1)."""

    r: Tensor
    log_p: Tensor
    log_rest: Tensor
    residual_loss: Tensor
    p_y: Tensor
    r_y: Tensor
    rest: Tensor


def mixture_terms_(
    z: Float[Tensor, "n V"],
    other: Float[Tensor, "n V"],
    labels: Int[Tensor, "n 1"],
    mixture: GeometricMixture,
) -> MixtureTerms:
    """p, with 0 at the label, in place of the student's logits; the other model's logits are used up."""
    at_label, r = z.gather(1, labels), torch.empty_like(other)
    mixture.logits_(other, z)
    if mixture.value != "cross_entropy":
        log_r = normalise_(other, out=r)[:, 0]
        residual_loss = expectation(r, other.sub_(z)) - log_r
    else:
        torch.softmax(other, -1, out=r)
        residual_loss = -expectation(r, z)
    log_z = normalise_(z)
    log_p, p_y, r_y = at_label - log_z, z.gather(1, labels), r.gather(1, labels)
    rest = z.scatter_(1, labels, 0.0).sum(-1, keepdim=True)
    log_rest = rest.log().clamp(min=-1e30)[:, 0]
    return MixtureTerms(r, log_p[:, 0], log_rest, residual_loss + log_z[:, 0], p_y, r_y, rest)


def mixture_gradient_(
    z: Float[Tensor, "n V"], labels: Int[Tensor, "n 1"], terms: MixtureTerms, trust: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """p - t d - (1 - t) r in place of what ``mixture_terms_`` left; returns the losses without the scale."""
    losses = mixed_loss(trust, terms.log_p, terms.residual_loss)
    t = trust[:, None]
    z.addcmul_(terms.r, t - 1)
    z.scatter_(1, labels, (1 - t) * (terms.p_y - terms.r_y) - t * terms.rest)  # p_y - t - (1 - t) r_y, uncancelled
    return losses


class UniformTerms(NamedTuple):
    """Of a chunk's rows, (n,) each: the label's logit, the mean logit, log p_y and log(1 - p_y)."""

    at_label: Tensor
    mean: Tensor
    log_p: Tensor
    log_rest: Tensor


def uniform_terms_(z: Float[Tensor, "n V"], labels: Int[Tensor, "n 1"]) -> UniformTerms:
    """p, with -(1 - p_y) at the label, in place of the logits."""
    at_label, tiles = z.gather(1, labels)[:, 0], []
    for rows, label in blocks(z, labels):
        mean = rows.mean(-1)
        log_p, log_rest = label_gradient_(rows, label)
        rows.mul_(log_rest.exp()[:, None])
        tiles.append(torch.stack([mean, log_p, log_rest]))
    return UniformTerms(at_label, *torch.cat(tiles, 1))


def uniform_gradient_(
    z: Float[Tensor, "n V"],
    labels: Int[Tensor, "n 1"],
    terms: UniformTerms,
    trust: Float[Tensor, " n"],
    mixture: GeometricMixture,
) -> Float[Tensor, " n"]:
    """p - t d in place of what ``uniform_terms_`` left; returns the losses without the scale.

    The other part of p - t d - (1 - t) / V is the same on every entry, and ``RowConstants`` adds it without a pass over them.
    """
    at_label, mean, log_p, log_rest = terms
    label_entry = (1 - trust) * log_p.exp() - trust * log_rest.exp()  # p_y - t without its cancellation
    z.scatter_(1, labels, label_entry[:, None])
    residual_loss = at_label - log_p - mean - (math.log(z.shape[1]) if mixture.value != "cross_entropy" else 0.0)
    residual_loss = residual_loss.masked_fill(mean == -torch.inf, torch.inf)  # of an impossible token: no inf - inf
    return mixed_loss(trust, log_p, residual_loss)


class RowConstants:
    """Gradients of hidden states, head and bias from a part of the logit gradients that is constant within every row."""

    def __init__(self, head: Head):
        wide = precision(head.weight.dtype)
        self.column = head.weight.sum(0, dtype=wide)
        self.head = torch.zeros(1, head.weight.shape[1], dtype=wide, device=head.weight.device)
        self.bias = self.head.new_zeros(())

    def sub_(
        self, c: Float[Tensor, "n 1"], hidden: Float[Tensor, "n H"], d_hidden: Float[Tensor, "n H"] | None
    ) -> None:
        """Subtract c from every entry of each row."""
        self.head -= c.T @ hidden
        self.bias -= c.sum()
        if d_hidden is not None:
            d_hidden.addcmul_(c, self.column, value=-1)


def mixed_loss(
    t: Float[Tensor, " n"], log_p: Float[Tensor, " n"], residual_loss: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """t NLL + (1 - t) times the loss toward the residual; a factor of 0 ignores even an infinite loss."""
    return torch.where(t == 0, 0.0, -t * log_p) + torch.where(t == 1, 0.0, (1 - t) * residual_loss)


class CachedTokens(Tokens):
    """Tokens without a graph that compute log p once; a copy with other logits is plain ``Tokens`` and has no cache."""

    @property
    def log_probs(self) -> Float[Tensor, "n V"]:
        """log p, (n, V)."""
        return self._log_probs

    @cached_property
    def _log_probs(self) -> Float[Tensor, "n V"]:
        return log_softmax(self.logits)


def target_gradient_(z: Float[Tensor, "n V"], tokens: CachedTokens, target: Target) -> Float[Tensor, " n"]:
    """g' in place of the logits, from the parts of the target where it is a construction; returns a in g = a g'."""
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
