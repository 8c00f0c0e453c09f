"""Verification of what a card declares, once per method: structure, scope, and the target beside the printed loss."""

import logging
import warnings
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qlens.core.autograd import gradient, ordinary
from qlens.core.errors import InputError
from qlens.core.numerics import spread
from qlens.core.probes.trial_tokens import trial_rows
from qlens.core.tokens import Tokens
from qlens.engine.finite_values import ADVICE
from qlens.engine.structures import gradients_by_structure
from qlens.engine.verification.batch_layout import is_model_loss, layout_dependence
from qlens.engine.verification.fingerprints import fingerprint
from qlens.engine.verification.row_dependence import SAMPLE, tolerance, why_dependent
from qlens.losses.leaves import refuse_learned
from qlens.losses.user_code import LossError
from qlens.registry import Variant
from qlens.registry.variant import ALONE

logger = logging.getLogger(__name__)
UNDECLARED = "a loss of your own may look at all of them together; if it does not, register it with scope='token'"
CANCELLED = 32  # roundings of the largest p by which two ways to p - Q may differ
TRIAL_ROWS, TRIAL_ENTRIES = 256, 2**20  # rows of every kind on which a declaration is verified, and their logits
_VERDICTS: WeakKeyDictionary[Callable, dict[tuple, "Verdict"]] = WeakKeyDictionary()  # no callable is kept alive


class Verdict(NamedTuple):
    """Why a method's rows must not be cut into parts, "" where they may; the number of rows and the state at that time."""

    reason: str
    rows: int
    state: int = 0


def why_whole(
    variant: Variant,
    sample: Callable[[Tensor], Tokens],
    rows: int,
    block: int,
    fields: dict[str, Tensor],
    trains: bool = False,
) -> str:
    """Why the rows of a batch must not be cut into parts, "" where they may; verified once per user's method.

    It is verified again where a batch has more rows than any before, since a loss may compare its rows only where there are
    enough, and where values that it reads beside its arguments have changed (``fingerprints``).

    Args:
        variant: the method; built-in ones are covered by tests and not verified here.
        sample: tokens at some of the batch's rows, by index.
        rows: how many rows the batch has.
        block: how many rows would be taken at a time.
        fields: per-token fields of the rows; a loss of pairs is tried on rows of both texts of some pairs.
        trains: whether gradients of hidden states and head are wanted; a parameter of the loss would get none.

    Raises:
        LearnedParameter: the loss has a parameter of its own, and ``trains``.
        InputError: the declared structure is not the loss's, or target and printed loss have different gradients.
    """
    declared = why_declared_whole(variant)
    if not rows or (variant.built_in and not declared):
        return ""
    cut = rows > block and variant.scope in ALONE
    verdicts, key = _verdicts_of(variant), (*_field_kinds(fields), *_card(variant), cut, trains)
    verdict = verdicts.get(key)
    if variant.built_in:
        if verdict is None:
            verdicts[key] = Verdict(declared, rows)
            _report(variant, declared)
        return declared
    functions = [fn for fn in (variant.method.fn, variant.method.printed) if fn is not None]
    state = hash(fingerprint(functions))
    more_rows = verdict is not None and cut and not verdict.reason and rows > verdict.rows
    if verdict is not None and not more_rows and state == verdict.state:
        return verdict.reason
    with torch.inference_mode(False):
        samples = ordinary(sample(_some(variant, rows, fields)))
    with (
        torch.inference_mode(False),
        torch.autocast(samples.logits.device.type, enabled=False),
        variant.replay(samples.logits.device).again(),  # a loss that draws numbers draws the same, verified or not
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of a statistic of one row, say
        _verify_layout(variant, samples)
        if trains:
            _verify_constants(variant, samples)
        _verify_gradient(variant, samples)
        reason = (verdict.reason if verdict else "") or declared or _why_undeclared_whole(variant)
        if cut and not reason:
            reason = why_dependent(variant, samples, sample, rows, block, fields)
    if (cut or declared) and reason not in [earlier.reason for earlier in verdicts.values()]:
        _report(variant, reason)
    verdicts[key] = Verdict(reason, max(rows, verdict.rows if verdict else 0), state)
    return reason


def _verdicts_of(variant: Variant) -> dict[tuple, Verdict]:
    """The verdicts on a method so far, by card and kind of batch."""
    try:
        return _VERDICTS.setdefault(variant.method.fn, {})
    except TypeError:  # it has no weak reference or no hash: verified anew every time
        return {}


def _field_kinds(fields: dict[str, Tensor]) -> list[tuple]:
    """For every per-token field: its name, whether it varies, and whether a mask has a True."""
    return [
        (name, value.ndim == 1 and bool((value != value[:1]).any()), value.dtype == torch.bool and bool(value.any()))
        for name, value in sorted(fields.items())
    ]


def _card(variant: Variant) -> tuple:
    """The parts of a card that a verdict depends on."""
    return variant.spec, str(variant.structure), variant.scope, id(variant.method.printed)


def why_declared_whole(variant: Variant) -> str:
    """Why a method's rows cannot be cut into parts, by its card alone; "" where they can."""
    if variant.scope in ALONE or variant.structure == "label":
        return ""
    if variant.scope == "batch":
        return f"it weighs tokens by a statistic of whole distributions (scope {variant.scope!r})"
    return (
        f"with scope {variant.scope!r} and structure 'dense' it may need whole distributions; if it is a function of "
        "the labels' log-probabilities alone, register it with structure='label'"
    )


def _why_undeclared_whole(variant: Variant) -> str:
    """Why the rows of a loss without a declared scope cannot be cut into parts; those of a target are tried instead."""
    return UNDECLARED if variant.derived and not variant.method.scope else ""


def _report(variant: Variant, reason: str) -> None:
    if reason:
        logger.warning("qlens holds the logits of a batch whole for %s: %s", variant.spec, reason)


def _some(variant: Variant, rows: int, fields: dict[str, Tensor]) -> Tensor:
    """Indices of a few rows, spread over the batch: up to four of each of some sequences; of pairs, two of both texts."""
    if variant.scope not in ALONE and {"pair", "chosen"} <= fields.keys():
        pair, chosen = fields["pair"], fields["chosen"].bool()
        ids = pair.unique()
        sides = [(pair == i) & (chosen == side) for i in ids[spread(len(ids), SAMPLE // 2)] for side in (True, False)]
        return torch.cat([side.nonzero()[:2, 0] for side in sides]).sort().values
    groups = next((fields[name] for name in ("sequence", "pair") if name in fields), None)
    if groups is None:
        return spread(rows, SAMPLE)
    ids = groups.unique()
    own = [(groups == i).nonzero()[:, 0] for i in ids[spread(len(ids), SAMPLE // 2)]]
    return torch.cat([at[spread(len(at), 4)] for at in own]).sort().values


def _verify_layout(variant: Variant, tokens: Tokens) -> None:
    """Check that a loss depends on a batch through its supervised rows alone."""
    if is_model_loss(variant):
        raise InputError(
            f"{variant.spec} runs a model on its inputs, f(model, inputs), which hidden states and a head are not: "
            "train it with QTrainer(variant=...), or write it as a loss of f(logits, labels)"
        )
    style = variant.unreduced.style(variant.shown(tokens).upcast()) if variant.is_loss_alone(tokens) else None
    if style is not None and style.laid_out and (reason := layout_dependence(variant, tokens, style)):
        raise InputError(
            f"{variant.spec} sees whole batches (B, T, V), and {reason}: hidden states of single tokens do not say "
            "that. Train it with QTrainer(variant=...)"
        )


def _verify_constants(variant: Variant, tokens: Tokens) -> None:
    """Check that the loss has no learnable parameter of its own, which would get no gradient."""
    with torch.enable_grad(), variant.replay(tokens.logits.device).again():
        leaf = tokens.logits.detach().requires_grad_()
        refuse_learned(variant.spec, variant.loss(tokens.with_logits(leaf)), leaf)


def _verify_gradient(variant: Variant, tokens: Tokens) -> None:
    """Check that the engine computes the gradient of the printed loss, on these rows and on trial rows of every kind.

    Before anything is learned, the rows of a first batch may all be alike.
    """
    if variant.is_loss_alone(tokens) and variant.structure == "dense":
        return  # it is computed by that very gradient
    _compare(variant, tokens, own=True)
    vocabulary = tokens.logits.shape[1]
    trial = trial_rows(tokens, max(SAMPLE, min(TRIAL_ROWS, TRIAL_ENTRIES // vocabulary)) // SAMPLE * SAMPLE)
    try:
        with torch.no_grad():
            variant.loss(trial)
            variant.target(trial)
    except LossError:  # it is written for particular data
        return
    _compare(variant, trial)


def _compare(variant: Variant, tokens: Tokens, own: bool = False) -> None:
    """Check that gradient and losses by the declared structure are those of the printed loss on some rows.

    Args:
        variant: the method.
        tokens: the rows.
        own: whether they are rows of the batch, where the chunk loop refuses values that are not finite.
    """
    replay = variant.replay(tokens.logits.device)
    expected = gradient(variant.loss, tokens)
    with replay.again():
        actual, values = gradients_by_structure(variant, tokens)
    finite, comparable = expected.isfinite().all(-1), actual.isfinite().all(-1) & ~values.isnan()
    finite = finite & comparable if own else finite  # elsewhere NaN beside a number is wrong too
    off = (expected - actual).abs().amax(-1)
    wrong = ~(off <= tolerance(expected) + _cancelled(variant, tokens)) & finite
    if variant.structure != "dense":
        with torch.no_grad(), replay.again():
            losses = variant.loss(tokens).to(values.dtype)
        wrong |= (losses - values).abs() > tolerance(losses)
        wrong = wrong & comparable if own else wrong
    rows = wrong.nonzero()[:, 0].tolist()
    if not rows:
        return
    where = f"at a token with p_y = {float(tokens.label_probs[rows[0]]):.2g} ({len(rows)} of {len(tokens)} tokens)"
    alone = variant.method.printed is None and not variant.is_loss_alone(tokens)
    if variant.structure == "label" and alone and bool((off <= tolerance(expected))[finite].all()):
        raise InputError(
            f"{variant.spec} declares structure='label', and its gradient is one of label probabilities, but its loss "
            "is not: the value s CE(Q, p) of a target alone sees the whole of p; write its printed loss, "
            f"@{variant.name}.loss, or leave structure out"
        )
    if variant.structure != "dense":
        raise InputError(
            f"{variant.spec} declares structure={variant.structure!r}, but has another loss or gradient {where}: "
            "declare structure='dense', or leave it out"
        )
    if not bool(comparable[rows[0]]):
        raise InputError(
            f"{variant.spec}: its target is NaN or infinite {where}, and the gradient of its printed loss is not: {ADVICE}"
        )
    raise InputError(
        f"{variant.spec}: the gradient of its printed loss and s (p - Q) of its target differ, "
        f"by {float(off[rows[0]]):.2g} {where}: "
        f"run qlens.testing.check_variant({variant.name!r})"
    )


def _cancelled(variant: Variant, tokens: Tokens) -> Tensor:
    """Rounding of s (p - Q) where Q is close to p, (N,); zero for a loss alone, which has no Q."""
    if variant.is_loss_alone(tokens):
        return torch.zeros_like(tokens.label_probs)
    with torch.no_grad(), variant.replay(tokens.logits.device).again():
        scale = variant.target(tokens).scale
    top = tokens.log_probs.amax(-1).exp()
    return CANCELLED * torch.finfo(top.dtype).eps * scale.nan_to_num(posinf=0.0) * top
