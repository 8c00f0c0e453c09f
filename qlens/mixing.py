"""Mixing: which methods drive toward the label and a geometric mix of the student and one other model."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from qlens import params
from qlens.collapse import DENSE, collapse, trials
from qlens.errors import InputError
from qlens.lens import gradient
from qlens.tokens import MODELS, Tokens, expectation, log_softmax
from qlens.variant import ALONE, Method, Variant


@dataclass(frozen=True)
class Mixture:
    r"""Q = t d + (1 - t) r with :math:`r \propto p^{own}\, \pi^{other}`, t and s functions of the label's probability alone.

    Args:
        model: whose distribution :math:`\pi` is; None where r is uniform, with own = other = 0.
        own, other: the exponents.
        entropy: whether the printed value is s (t NLL + (1 - t) KL(r || p)); else its second part is the cross-entropy CE(r, p).
    """

    model: str | None
    own: float
    other: float
    entropy: bool

    def logits_(self, y: Float[Tensor, "n V"], z: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """log r up to a constant in place of the other model's logits y, for the student's z."""
        if self.other == 0:  # 0 times -inf is not 0
            y.zero_()
        elif self.other != 1:
            y.mul_(self.other)
        return y.add_(z, alpha=self.own) if self.own else y


def mixture(variant: Variant) -> Mixture | None:
    """What a method mixes, found on the probes, whatever its card says; None where it is no such mixture.

    Example:
        >>> from qlens import get
        >>> mixture(get("target_sft(eta=0.25)"))
        Mixture(model='teacher', own=0.75, other=0.25, entropy=False)
    """
    return _mixture(variant.method, variant.spec)


@lru_cache(maxsize=1024)
def _mixture(method: Method, spec: str) -> Mixture | None:
    """Remembered by method and spec: a training step asks anew, with a variant of its own."""
    variant = method.variant(**params.parse(spec)[1])
    models = [name for name in variant.needs if name in MODELS]
    if variant.scope not in ALONE or len(models) > 1 or any(name in variant.needs for name in DENSE):
        return None
    found = {_on(variant, models[0] if models else None, tokens) for tokens in trials()}
    return found.pop() if len(found) == 1 else None


def _on(variant: Variant, model: str | None, tokens: Tokens) -> Mixture | None:
    """The mixture that explains target, value and gradient on these tokens to rounding."""
    try:
        target, value = variant.target(tokens), variant.loss(tokens)
        uniform = isinstance(target.named, str) and target.named == "uniform"
        if not uniform and (model is None or not isinstance(target.named, Tensor)):
            return None
        small = collapse(tokens)
        small = small.replace(**({model: small.logits} if model else {}))  # t and s may not depend on the other model
        few = variant.target(small)
    except InputError:  # these parameters want more entries, or another kind of loss
        return None
    log_p = tokens.log_probs
    log_pi = log_p if model is None else tokens.log_probs_of(model)
    own, other = (0.0, 0.0) if uniform else _exponents(torch.as_tensor(target.named).log(), log_p, log_pi)
    r = log_softmax(own * log_p + other * log_pi)
    t, s = few.trust, few.scale
    pulled = s * (t * -tokens.label_log_probs - (1 - t) * expectation(r.exp(), log_p))
    known = s * (1 - t) * expectation(r.exp(), r)
    g = s[:, None] * (tokens.probs - t[:, None] * tokens.one_hot - (1 - t)[:, None] * r.exp())
    size = s.abs().clamp(min=1)
    near = (g - gradient(variant.loss, tokens)).abs().amax(-1) <= 1e-9 * size
    if not bool(near.all()):
        return None
    for entropy, made in ((False, pulled), (True, pulled + known)):
        if bool(((value - made).abs() <= 1e-9 * made.abs().clamp(min=1)).all()):
            return Mixture(model, own, other, entropy)
    return None


def _exponents(log_r: Tensor, log_p: Tensor, log_pi: Tensor) -> tuple[float, float]:
    """own and other in log r = own log p + other log pi + c, by least squares over all entries."""
    centred = [(x - x.mean(-1, keepdim=True)).flatten() for x in (log_p, log_pi, log_r)]
    if not all(bool(x.isfinite().all()) for x in centred):
        return 0.0, 0.0
    fit = torch.linalg.lstsq(torch.stack(centred[:2], 1), centred[2][:, None])
    own, other = fit.solution.flatten().tolist()
    return round(own, 12) + 0.0, round(other, 12) + 0.0  # an exact 0 leaves its factor out, even one of -inf
