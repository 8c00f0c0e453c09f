"""Explain: everything that can be read off the gradient of a loss."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qlens.core.autograd import ordinary
from qlens.core.errors import InputError, brief
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.lens.exact import read_exactly
from qlens.lens.explanation import Explanation
from qlens.lens.findings import Study, own_spec
from qlens.lens.identify import matching
from qlens.lens.reading import Reading, on_trials, whole_where_needed
from qlens.lens.rounding import nothing_but_rounding
from qlens.losses import calling, user_code
from qlens.registry import Variant, resolve


@user_code.quiet()
@torch.inference_mode(False)
def explain(
    loss: Variant | str | Callable,
    tokens: Tokens | None = None,
    *,
    pieces: Callable[[int], str] | None = None,
    residuals: Mapping[str, Tensor] | None = None,
) -> Explanation:
    r"""What any loss teaches: its implied Q = p - g, its trust in the label, and the method it comes nearest to.

    The loss is read on the tokens shown, in float64 where it allows that, and on wider trial tokens
    (``qlens.core.probes.trials``): a method is named only where it has the gradient on both.

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
    if tokens is not None and not isinstance(tokens, Tokens):
        raise InputError(f"tokens must be qlens.Tokens(logits=..., labels=...) or None, got {brief(tokens)}")
    variant, whole = whole_where_needed(resolve(loss), tokens)
    if residuals and tokens is None:
        raise InputError("residuals are probabilities at your tokens: give explain(loss, tokens, residuals=...)")
    if tokens is not None and not len(tokens):
        raise InputError("tokens holds no rows: there is nothing to explain the loss on")
    given = variant
    variant, shown, own = read_exactly(given, None if tokens is None else ordinary(tokens))
    e = Explanation(
        variant,
        shown.given,
        Target.from_grad(shown.given, shown.grad),
        shown.losses,
        [],
        pieces,
        written=calling.written(variant.method.fn, variant.params, shown.given),
        on_probes=tokens is None,
        precision=shown.precision,
        own=own,
        stored=None if tokens is None else tokens.logits.dtype,
        registered=bool(own_spec(variant)),
        whole=whole,
    )
    if not shown.finite:
        return e
    if nothing_but_rounding(variant.loss, shown.given, shown.grad, shown.precision):
        near = matching.nearest(shown.grad, shown.tokens, own_spec(variant), shown.noise)
        silent = replace(e, nearest=[match for match in near if match.relation == "identical"], silent=True)
        return silent if tokens is not None else _widened(silent, given)
    return Study(e, shown, residuals or {}, given).run()


def _widened(e: Explanation, given: Variant) -> Explanation:
    """A loss that is silent on the probes, with what the wider trial tokens say of it."""
    wide = on_trials(e.variant, Reading.of(e.variant, e.tokens))
    if isinstance(wide, str) or nothing_but_rounding(e.variant.loss, wide.given, wide.grad, wide.precision):
        return e
    made = Explanation(
        e.variant, wide.given, Target.from_grad(wide.given, wide.grad), wide.losses, [], on_probes=True,
        written=e.written, precision=wide.precision, own=e.own, registered=e.registered, whole=e.whole,
    )  # fmt: skip
    return Study(made, wide, {}, given).run()
