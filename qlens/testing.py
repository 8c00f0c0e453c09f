"""Contract of a method in float64: ``check_variant`` runs it on any method or loss."""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from qlens.core.autograd import gradient, slopes
from qlens.core.deprecation import renamed_arguments
from qlens.core.errors import InputError
from qlens.core.probes import probes
from qlens.core.probes.trial_tokens import edge_tokens, extreme_tokens, random_tokens, wide_tokens
from qlens.core.scales import PRECISION
from qlens.core.tokens import MODELS, Tokens
from qlens.engine.structures import gradients_by_structure
from qlens.registry import Variant, get, names, resolve
from qlens.registry.params import parse

TOLERANCE = PRECISION[torch.float64]

VOCABULARIES = (2, 3, 11, 101, 1000, 5000)
"""Vocabularies on which a declared structure is tested: gates on ranks, entropies and top-k masses show at one of them."""

CONTRACT: dict[str, Callable[[Variant], None]] = {}


@renamed_arguments(thing="loss")
@torch.inference_mode(False)
def check_variant(loss: Variant | str | Callable) -> tuple[str, ...]:
    """Run the contract that all methods of qlens keep.

    A loss without a target of its own cannot be compared with one: ``identity`` and, where it is dense,
    ``structure_as_declared`` are left out, with a warning that also says whether its gradient is the derivative of its value.

    Args:
        loss: a Variant, a spec, a registered method or a function.

    Returns:
        The names of the checks that were run.

    Raises:
        AssertionError: naming every check that failed, with its reason.

    Example:
        >>> len(check_variant("label_smoothing(epsilon=0.3)")) == len(CONTRACT)
        True
    """
    variant, failures = resolve(loss), []
    alone = variant.derived
    vacuous = ("identity", "structure_as_declared")[: 1 + (variant.structure == "dense")] if alone else ()
    checks = {name: check for name, check in CONTRACT.items() if name not in vacuous}
    for name, check in checks.items():
        try:
            check(variant)
        except (AssertionError, InputError, RuntimeError, IndexError) as failure:
            failures.append(f"{name}: {failure}")
    if failures:
        raise AssertionError(f"{variant.spec} breaks {len(failures)} of {len(checks)} checks:\n" + "\n".join(failures))
    for remark in _remarks(variant, vacuous):
        warnings.warn(remark, stacklevel=2)
    return tuple(checks)


def _remarks(variant: Variant, vacuous: tuple[str, ...]) -> Iterator[str]:
    """The parts of the contract that could not be tested, a sentence each."""
    if vacuous:
        yield (
            f"{variant.spec} is a loss without a target of its own to compare it with, so that {' and '.join(vacuous)} cannot "
            f"fail and {'was' if len(vacuous) == 1 else 'were'} not run. {_slope_remark(variant)} To test what it should teach, "
            f"register its target, and the loss beside it with @{variant.name}.loss."
        )
    least = least_vocabulary(variant)
    if least > VOCABULARIES[0]:
        yield f"{variant.spec} does not run on a vocabulary below {least}: it was checked from there on."


def _slope_remark(variant: Variant) -> str:
    """Whether the gradient is the derivative of the value, in a sentence."""
    tokens = _drawn(random_tokens, 16, vocabulary_of(variant))
    with torch.no_grad():
        pairs = list(slopes(lambda t: variant.loss(t).sum(), gradient(variant.loss, tokens), tokens, 1e-6, seed=0))
    gaps = sorted(abs(slope - numerical) / max(abs(slope), abs(numerical), 1e-9) for slope, numerical in pairs)
    if gaps[1] < 1e-4:  # a kink crossed by one direction says nothing
        return "Its gradient is the derivative of its value: nothing in it is held constant; was a weight meant to be detached?"
    return (
        f"Its gradient is not the derivative of its value (off by {gaps[1]:.0%} along random directions): something in it is "
        "detached; was it meant to be?"
    )


def _contract(check: Callable[[Variant], None]) -> Callable[[Variant], None]:
    CONTRACT[check.__name__] = check
    return check


def _drawn(draw: Callable[..., Tokens], *args: Any, **kwargs: Any) -> Tokens:
    """A copy of trial tokens that are drawn once: a method may write on its inputs."""
    return Tokens(**_cached_draw(draw, *args, **kwargs).copied().fields())  # checked, as the drawn ones are


@functools.lru_cache(maxsize=32)
def _cached_draw(draw: Callable[..., Tokens], *args: Any, **kwargs: Any) -> Tokens:
    return draw(*args, **kwargs)


def least_vocabulary(variant: Variant) -> int:
    """The smallest of ``VOCABULARIES`` that a method runs on; a top-k loss needs k entries.

    Raises:
        InputError: it runs on none of them; the last error is named.
    """
    error: Exception | None = None
    for v in VOCABULARIES:
        try:
            variant.target(_drawn(wide_tokens, v))
        except (RuntimeError, IndexError, InputError) as raised:
            error = raised
        else:
            return v
    raise InputError(
        f"{variant.spec} runs on no vocabulary from {VOCABULARIES[0]} to {VOCABULARIES[-1]}: {error}"
    ) from error


def vocabulary_of(variant: Variant) -> int:
    """The vocabulary that a method is checked on: 24, or the least that it runs on."""
    return max(24, least_vocabulary(variant))


def cases(variant: Variant) -> Iterator[tuple[str, Tokens]]:
    """Ordinary, extreme, tiny and empty tokens, by name; the smallest pair has 2 tokens."""
    least, v = 2 if variant.scope == "pair" else 1, vocabulary_of(variant)
    yield "random", _drawn(random_tokens, 64, v)
    yield "sharp", _drawn(random_tokens, 64, v, spread=10.0)
    yield "probes", probes(vocabulary=max(32, v))
    yield "p_y from 1e-12 to 1 - 1e-12", _drawn(edge_tokens, v)
    yield f"V = {least_vocabulary(variant)}", _drawn(random_tokens, 16, least_vocabulary(variant))
    yield f"N = {least}", _drawn(random_tokens, least, v)
    yield "N = 0", _drawn(random_tokens, 1, v)[:0]
    yield "|z| = 1e4", _drawn(extreme_tokens, v)


@_contract
def identity(variant: Variant) -> None:
    """The gradient of the printed loss is s (p - Q)."""
    for case, tokens in cases(variant):
        target = variant.target(tokens)
        explicit = target.scale[:, None] * (tokens.probs - target.q)
        _close(gradient(variant.loss, tokens), explicit, f"gradient of the loss against s (p - Q), {case}")
        _close(target.grad, explicit, f"target.grad against s (p - Q), {case}")


@_contract
def structure_as_declared(variant: Variant) -> None:
    """By the declared structure, the engine computes the gradient and the value of the loss, at any vocabulary."""
    for v in (v for v in VOCABULARIES if v >= least_vocabulary(variant)):
        tokens = _drawn(wide_tokens, v)
        grad, losses = gradients_by_structure(variant, tokens)
        what = f"by structure={variant.structure!r} at a vocabulary of {v}"
        _close(grad, gradient(variant.loss, tokens), f"gradient {what}")
        with torch.no_grad():
            _close(losses, variant.loss(tokens), f"loss {what}")


@_contract
def sums_to_one(variant: Variant) -> None:
    """Q adds up to 1 on every token, except where the method declares that it sees raw logits."""
    for case, tokens in cases(variant):
        q = variant.target(tokens).q
        size = q.abs().amax(-1).clamp(min=1)
        if variant.invariant:
            _close(q.sum(-1) / size, 1 / size, f"sum(Q), {case}")


@_contract
def simplex_as_declared(variant: Variant) -> None:
    """Q, at the method's own scale, is always a distribution exactly where that is declared."""
    v = vocabulary_of(variant)
    wide = [_drawn(random_tokens, 256, v, spread, seed=1) for spread in (1.0, 3.0, 10.0)]
    inside = [bool(variant.target(tokens).in_simplex.all()) for tokens in (*(t for _, t in cases(variant)), *wide)]
    if variant.simplex is True:
        assert all(inside), "declared simplex, but Q has negative entries on some tokens"
    if variant.simplex is False:
        assert not all(inside), "declared off the simplex, but Q was a distribution on every token tried"


@_contract
def finite(variant: Variant) -> None:
    """Loss, gradient, Q and scale are finite on every token."""
    for case, tokens in cases(variant):
        target = variant.target(tokens)
        parts = {"loss": variant.loss(tokens), "Q": target.q, "scale": target.scale, "gradient": target.grad}
        for part, value in (parts | {"autograd's gradient": gradient(variant.loss, tokens)}).items():
            assert len(value) == len(tokens), f"{part} has {len(value)} rows for {len(tokens)} tokens, {case}"
            assert bool(value.isfinite().all()), f"{part} is not finite, {case}"


@_contract
def invariant_to_a_constant(variant: Variant) -> None:
    """Adding a constant to a row of logits changes neither loss nor target, exactly where that is declared."""
    tokens = _drawn(random_tokens, 32, vocabulary_of(variant))
    by = torch.linspace(-7, 7, 32, dtype=torch.float64)[:, None]
    shifted = tokens.replace(**{name: getattr(tokens, name) + by for name in ("logits", *MODELS)})
    if not variant.invariant:
        return
    _close(variant.loss(shifted), variant.loss(tokens), "loss at z + c")
    _close(variant.target(shifted).q, variant.target(tokens).q, "Q at z + c")


@_contract
def equivariant_under_permutation(variant: Variant) -> None:
    """Renaming the vocabulary renames Q and changes no loss."""
    v = vocabulary_of(variant)
    tokens = _drawn(random_tokens, 32, v)
    order = torch.randperm(v, generator=torch.Generator().manual_seed(3))
    permuted = {name: getattr(tokens, name)[:, order] for name in ("logits", *MODELS, "negatives")}
    renamed = tokens.replace(labels=order.argsort()[tokens.labels], **permuted)
    _close(variant.loss(renamed), variant.loss(tokens), "loss with a renamed vocabulary")
    _close(variant.target(renamed).q, variant.target(tokens).q[:, order], "Q with a renamed vocabulary")


@_contract
def scales_keep_the_gradient(variant: Variant) -> None:
    """``at`` changes (s, Q), never s (p - Q); the natural Q has no negative entry."""
    for case, tokens in cases(variant):
        target = variant.target(tokens)
        scales = ["unit", "natural"] + ["structural"] * (not isinstance(target.structural, str))
        for scale in scales:
            other = target.at(scale)
            # pushed down from p = 0, a token's Q is below 0 at any scale
            rows = ((target.probs > 0) | (target.grad <= 0)).all(-1) if scale == "natural" else slice(None)
            rounding = other.scale[:, None].clamp(min=1)  # a large s multiplies Q's last digit
            grad = other.scale[:, None] * (other.probs - other.q)
            _close((grad / rounding)[rows], (target.grad / rounding)[rows], f"s (p - Q) at {scale} scale, {case}")
            if scale == "natural":
                negative = other.negative_mass[rows]
                assert bool((negative <= TOLERANCE).all()), f"Q at natural scale has negative entries, {case}"


@_contract
def weight_multiplies(variant: Variant) -> None:
    """``tokens.weight`` multiplies loss and scale, and leaves Q alone."""
    tokens = _drawn(random_tokens, 16, vocabulary_of(variant))
    group = {"sequence": tokens.sequence, "pair": tokens.pair}.get(variant.scope, torch.arange(16))
    weight = torch.linspace(0, 3, 16, dtype=torch.float64)[group]
    heavy, plain = variant.target(tokens.replace(weight=weight)), variant.target(tokens)
    _close(heavy.grad, plain.grad * weight[:, None], "gradient under weights")
    _close(
        gradient(variant.loss, tokens.replace(weight=weight)), plain.grad * weight[:, None], "autograd under weights"
    )
    _close(variant.loss(tokens.replace(weight=weight)), variant.loss(tokens) * weight, "loss under weights")


@_contract
def scope_is_kept(variant: Variant) -> None:
    """A row's target depends on nothing beyond its scope: its own token, its sequence or its pair."""
    tokens = _drawn(random_tokens, 24, vocabulary_of(variant))
    ids = {"token": torch.arange(24), "sequence": tokens.sequence, "pair": tokens.pair}.get(variant.scope)
    if ids is not None:
        whole = variant.target(tokens)
        for group in ids.unique()[[0, -1]]:
            in_group = ids == group
            alone = variant.target(tokens[in_group])
            _close(alone.q, whole.q[in_group], f"Q of a {variant.scope} alone against Q among others")
            _close(alone.scale, whole.scale[in_group], f"scale of a {variant.scope} alone")


@_contract
def constants_carry_no_gradient(variant: Variant) -> None:
    """The target is detached, and no gradient reaches another model."""
    tokens = _drawn(random_tokens, 8, vocabulary_of(variant))
    leaves = {name: getattr(tokens, name).clone().requires_grad_() for name in ("logits", *MODELS)}
    tokens = tokens.replace(**leaves)
    target = variant.target(tokens)
    attached = [name for name in ("q", "scale", "grad", "trust") if getattr(target, name).requires_grad]
    assert not attached, f"the target's {attached} carries a gradient"
    variant.loss(tokens).sum().backward()
    reached = [name for name in MODELS if leaves[name].grad is not None and leaves[name].grad.abs().max() > 0]
    assert not reached, f"the gradient reaches {reached}, which must be constants"


@_contract
def spec_round_trips(variant: Variant) -> None:
    """A registered method's spec reads back as the same method at the same parameters."""
    if parse(variant.spec)[0] in names():
        parsed = get(variant.spec)
        assert (parsed.name, parsed.params, parsed.spec) == (variant.name, variant.params, variant.spec)


def _close(actual: Tensor, expected: Tensor, what: str) -> None:
    size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert_close(actual, expected, rtol=0.0, atol=TOLERANCE * size, msg=lambda text: f"{what}: {text}")
