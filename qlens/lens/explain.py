"""Explain: what the gradient of a loss teaches, and which registered method it is."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlens.core.autograd import ordinary
from qlens.core.deprecation import renamed_arguments
from qlens.core.errors import InputError, brief
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.lens.decompose.mixture_search import check_residuals
from qlens.lens.exact import read_exactly
from qlens.lens.explanation import Explanation
from qlens.lens.gradient_analysis import GradientAnalysis, own_spec
from qlens.lens.identify import matching
from qlens.lens.reading import Reading, on_trials, whole_where_needed
from qlens.lens.rounding import nothing_but_rounding
from qlens.lens.text.explained import explain_text
from qlens.lens.text.sampling import WHOLE
from qlens.losses import calling, user_code
from qlens.losses.layout.trial import holds_rows
from qlens.registry import Variant, resolve


@renamed_arguments(pieces="token_text")
@torch.inference_mode(False)
def explain(
    loss: Variant | str | Callable,
    tokens: Tokens | None = None,
    *,
    token_text: Callable[[int], str] | Any | None = None,
    residuals: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> Explanation:
    r"""Read the implied target Q = p - g of a loss: its label weight, its residual and the nearest registered method.

    The loss is read in float64 where it allows that, on the tokens given and on wider trial tokens
    (``qlens.core.probes.trials``): a method is named only where it has the gradient on both. A long text is analysed on some
    of its tokens, spread over p_y, and the findings are then compared on all of them (``coverage``).

    Args:
        loss: a Variant, a spec, FILE.py:FUNCTION, or a callable (see ``implied_target``).
        tokens: N supervised positions; by default the built-in probes, on which p_y runs from 1e-6 to 1 - 1e-6.
        token_text: a tokenizer, or a function from a token id to its text such as ``lambda i: tokenizer.decode([i])``;
            names labels and runner-ups in printed tables.
        residuals: further distributions that may be part of the target, probabilities (N, V) by name; with ``tokens`` only.
        progress: show a bar on stderr while a long text is read.

    Returns:
        An Explanation: printable, with ``summary``, ``table``, ``nearest``, ``residual``, ``law``, ``plot()`` and exports.

    Raises:
        InputError: the loss cannot be called, has no gradient or is random; there are no tokens.

    Source: Xie et al. 2026 (arXiv 2606.11189).

    Example:
        >>> import torch.nn.functional as F
        >>> e = explain(lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1))
        >>> e.nearest[0].spec, e.nearest[0].relation
        ('label_smoothing', 'identical')
    """
    if tokens is not None and not isinstance(tokens, Tokens):
        raise InputError(f"tokens must be qlens.Tokens(logits=..., labels=...) or None, got {brief(tokens)}")
    if residuals and tokens is None:
        raise InputError("residuals are probabilities at your tokens: give explain(loss, tokens, residuals=...)")
    if tokens is not None and not len(tokens):
        raise InputError("tokens holds no rows: there is nothing to explain the loss on")
    token_text, residuals = _text_of(token_text), residuals or {}
    with user_code.quiet():
        variant = resolve(loss)
        long = tokens is not None and tokens.logits.numel() > WHOLE
        by_rows = tokens is not None and long and not (variant.compares_pairs or holds_rows(variant.method.fn, tokens))

    def analyse(
        some: Tokens | None, distributions: Mapping[str, Tensor]
    ) -> tuple[Explanation, GradientAnalysis | None]:
        return _analysed(variant, some, token_text, distributions)

    if tokens is not None and by_rows:
        check_residuals(residuals, tokens)
        if (e := explain_text(tokens, residuals, analyse, progress)) is not None:
            return e
    with user_code.quiet():
        return analyse(tokens, residuals)[0]


def _analysed(
    variant: Variant,
    tokens: Tokens | None,
    token_text: Callable[[int], str] | None,
    residuals: Mapping[str, Tensor],
) -> tuple[Explanation, GradientAnalysis | None]:
    """The explanation of a loss on tokens, analysed as a whole, and the analysis; None where there is no gradient."""
    original, whole_batch = whole_where_needed(variant, tokens)
    variant, shown, own_precision = read_exactly(original, None if tokens is None else ordinary(tokens))
    e = Explanation(
        variant,
        shown.inputs,
        Target.from_grad(shown.inputs, shown.grad),
        shown.losses,
        [],
        token_text,
        modified_inputs=calling.modified_arguments(variant.method.fn, variant.params, shown.inputs),
        on_probes=tokens is None,
        precision=shown.precision,
        own_precision=own_precision,
        logits_dtype=None if tokens is None else tokens.logits.dtype,
        registered=bool(own_spec(variant)),
        whole_batch=whole_batch,
    )
    if not shown.finite:
        return e, None
    if nothing_but_rounding(variant.loss, shown.inputs, shown.grad, shown.precision):
        near = matching.nearest(shown.grad, shown.tokens, own_spec(variant), shown.noise)
        zero = replace(e, nearest=[match for match in near if match.relation == "identical"], zero_gradient=True)
        return zero if tokens is not None else _on_trial_tokens(zero, original), None
    analysis = GradientAnalysis(e, shown, residuals, original)
    return analysis.run(), analysis


def _text_of(token_text: Any) -> Callable[[int], str] | None:
    """A function from a token id to its text, given as such or as a tokenizer.

    Raises:
        InputError: neither.
    """
    decode = getattr(token_text, "decode", None)
    if callable(decode):
        return lambda token: repr(decode([token]))
    if token_text is None or callable(token_text):
        return token_text
    raise InputError(
        f"token_text must be a tokenizer or a function from a token id to its text, got {brief(token_text)}; "
        "write token_text=tokenizer"
    )


def _on_trial_tokens(e: Explanation, original: Variant) -> Explanation:
    """The explanation of a loss without a gradient on the probes, read on the trial tokens; as it is without one there too."""
    trial = on_trials(e.variant, Reading.of(e.variant, e.tokens))
    if isinstance(trial, str) or nothing_but_rounding(e.variant.loss, trial.inputs, trial.grad, trial.precision):
        return e
    read = replace(
        e,
        tokens=trial.inputs,
        target=Target.from_grad(trial.inputs, trial.grad),
        losses=trial.losses,
        nearest=[],
        precision=trial.precision,
        zero_gradient=False,
    )
    return GradientAnalysis(read, trial, {}, original).run()
