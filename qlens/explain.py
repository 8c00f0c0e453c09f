"""Explain: everything that can be read off the gradient of a loss."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qlens import calling, guards, matching, params
from qlens.errors import InputError
from qlens.explanation import Explanation
from qlens.findings import identify
from qlens.findings.laws import Law, law
from qlens.findings.leaks import leak
from qlens.findings.mixtures import Mixture, decompose
from qlens.findings.scope import scope
from qlens.lens import carried, gradient, read
from qlens.notes import supplied
from qlens.probes import probes
from qlens.registry import Variant, methods, resolve
from qlens.target import Target
from qlens.tokens import Tokens, spread

ELSEWHERE = 101  # another vocabulary, on which what was found is tried again
MATCHED, SEARCHED = (
    400_000,
    40_000,
)  # entries of the logits: on more, methods are neither compared nor their parameters fitted
# By the digits of a gradient: the relative misfit and the absolute noise that count as rounding.
ROUNDING = {
    torch.float64: (1e-6, 1e-15), torch.float32: (1e-3, 1e-6), torch.float16: (2e-2, 1e-3), torch.bfloat16: (5e-2, 1e-2)
}  # fmt: skip


@guards.quiet()
def explain(
    loss: Variant | str | Callable,
    tokens: Tokens | None = None,
    *,
    pieces: Callable[[int], str] | None = None,
    residuals: Mapping[str, Tensor] | None = None,
) -> Explanation:
    r"""What any loss teaches: its implied Q = p - g, its trust in the label, and the method it comes nearest to.

    Args:
        loss: a Variant, a spec, FILE.py:FUNCTION, or a callable (see ``implied_target``).
        tokens: where to read it; by default the built-in probes, on which p_y runs from 1e-6 to 1 - 1e-6.
        pieces: turns a token id into its text, for printing (a tokenizer's ``convert_ids_to_tokens``, say).
        residuals: distributions of your own that it may send probability to, (N, V) by name; with ``tokens`` only.

    Raises:
        InputError: the loss cannot be called, has no gradient or is random, or there are no tokens; what it raised is named.

    Source: Xie et al. 2026 (arXiv 2606.11189).

    Example:
        >>> import torch.nn.functional as F
        >>> e = explain(lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1))
        >>> e.nearest[0].spec, e.nearest[0].relation
        ('label_smoothing', 'identical')
    """
    variant, own = resolve(loss), residuals or {}
    if own and tokens is None:
        raise InputError("residuals are probabilities at your tokens: give explain(loss, tokens, residuals=...)")
    if tokens is None:
        try:
            read = _read(variant, probes(), pieces, own)
        except InputError as error:  # a loss with float32 inside may refuse float64
            if not isinstance(error.__cause__, RuntimeError):
                raise
            read = None
        if read is not None and carried(read.target.grad) == torch.float64:
            return read
        tokens = probes(torch.float32)
    if not len(tokens):
        raise InputError("tokens holds no rows: there is nothing to explain the loss on")
    return _read(variant, tokens, pieces, own)


def _read(
    variant: Variant, tokens: Tokens, pieces: Callable[[int], str] | None, own: Mapping[str, Tensor]
) -> Explanation:
    try:
        tokens = supplied(variant.method.fn, variant.params, tokens) if variant.derived else tokens
        with torch.no_grad():
            losses = variant.loss(tokens)
        grad = read(variant, tokens, variant.loss)
        again = read(variant, tokens, variant.loss)
        written = calling.written(variant.method.fn, variant.params, tokens)
    except InputError:
        raise
    except Exception as error:  # anything at all may go wrong inside a user's loss
        raise InputError(f"{variant.spec} raised {type(error).__name__}: {error}") from error
    target = Target.from_grad(tokens, grad)
    if not bool(grad.isfinite().all() and grad.any()):
        near = matching.nearest(target.grad, tokens, skip=_own_spec(variant)) if bool(grad.isfinite().all()) else []
        return Explanation(variant, tokens, target, losses, near, pieces, written=written)
    off = float((grad - again).norm() / grad.norm())
    if off > ROUNDING[carried(grad)][0]:
        raise InputError(
            f"{variant.spec} is random: two calls on the same tokens differ by {off:.0%}. Seed it, or switch dropout off"
        )
    return _understood(Explanation(variant, tokens, target, losses, [], pieces, written=written), own)


def _understood(e: Explanation, own: Mapping[str, Tensor]) -> Explanation:
    """With everything that can be read off its gradient, in the digits that it has."""
    rows, grad = e.variant.loss, e.target.grad
    tolerance, noise = ROUNDING[carried(grad)]
    found = leak(grad, e.tokens, tolerance)
    seen, tokens = (found.grad, found.tokens) if found is not None and found.cause else (grad, e.tokens)
    mixture = decompose(seen, tokens, own, tolerance, noise)
    laws = _laws(mixture, tokens, tolerance, noise)
    if found is not None:
        mixture = replace(mixture, index=found.rows[mixture.index])
    reach = scope(rows, e.tokens, tolerance)
    some, its = _thinned(e.variant, tokens, seen, MATCHED, seen is grad)
    own_spec = _own_spec(e.variant)
    near = matching.nearest(its, some, own_spec, tolerance)
    if not (near and near[0].same):
        most = 0 if own_spec else identify.SEARCHED  # who has a name already needs no long search for another
        few, its = _thinned(e.variant, some, its, SEARCHED, seen is grad)
        near = [*identify.search(its, few, params.parse(own_spec)[0], most), *near]
    made = replace(e, nearest=near, mixture=mixture, laws=laws, scope=reach, leak=found)
    return replace(made, elsewhere=_elsewhere(made, tolerance, noise)) if e.on_probes and found is None else made


def _thinned(variant: Variant, tokens: Tokens, grad: Tensor, most: int, anew: bool) -> tuple[Tokens, Tensor]:
    """Fewer tokens, if their logits have more than so many entries, and the gradient on these.

    It is read ``anew``, as a batch of their own, unless what is compared is no longer the loss's own gradient.
    """
    if tokens.logits.numel() <= most:
        return tokens, grad
    rows = spread(len(tokens), max(8, most // tokens.logits.shape[1])).to(tokens.logits.device)
    few = tokens[rows]
    return few, gradient(variant.loss, few) if anew else grad[rows]


def _own_spec(variant: Variant) -> str:
    """The spec of a registered loss, not to be compared with itself; a function of the same name is somebody else's."""
    return variant.spec if methods().get(variant.name) is variant.method else ""


def _laws(mixture: Mixture, tokens: Tokens, tolerance: float, noise: float) -> dict[str, Law | None]:
    if not mixture.explains:
        return {}
    some = tokens[mixture.index.to(tokens.logits.device)]
    known = {name: torch.where(mixture.unique, pull, torch.nan) for name, pull in mixture.parts.items()}
    return {name: law(pull, some, tolerance, noise) for name, pull in known.items()}


def _elsewhere(e: Explanation, tolerance: float, noise: float) -> str:
    """Whether another vocabulary reads the same: what was found is then no accident of the first."""
    assert e.mixture is not None
    other = probes(e.tokens.logits.dtype, vocabulary=ELSEWHERE)
    try:
        other = supplied(e.variant.method.fn, e.variant.params, other) if e.variant.derived else other
        grad = gradient(e.variant.loss, other)
    except Exception as error:  # a loss may be written for one vocabulary
        return f"at V = {ELSEWHERE} the loss raises {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"
    mixture = decompose(grad, other, None, tolerance, noise)
    said = [_in_short(e.mixture, e.laws), _in_short(mixture, _laws(mixture, other, tolerance, noise))]
    return f"the same at V = {ELSEWHERE}." if said[0] == said[1] else f"at V = {ELSEWHERE} it reads {said[1]}."


def _in_short(mixture: Mixture, laws: Mapping[str, Law | None]) -> str:
    if not mixture.explains:
        return "as no mixture"
    formulas = {name: law.formula if law else "(...)" for name, law in laws.items()}
    return " + ".join(f"{formulas[name]} of {name}" for name in mixture.parts)
