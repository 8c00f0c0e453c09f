"""The contract every method keeps, in float64: run it on your own method with ``check_variant``."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.testing import assert_close

from qlens.errors import InputError
from qlens.lens import gradient
from qlens.params import parse
from qlens.probes import probes
from qlens.registry import Variant, get, names, resolve
from qlens.tokens import MODELS, Tokens

PRECISION = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""How far a gradient may be from the exact one of the same logits, as a share of max(1, largest |g|), by their dtype."""
TOLERANCE = PRECISION[torch.float64]

CONTRACT: dict[str, Callable[[Variant], None]] = {}


def check_variant(thing: Variant | str | Callable) -> tuple[str, ...]:
    """Run the whole contract on a method, the one qlens' own methods keep; returns the names of the checks.

    Raises:
        AssertionError: naming every check that failed, with its reason.

    Example:
        >>> len(check_variant("label_smoothing(epsilon=0.3)")) == len(CONTRACT)
        True
    """
    variant, failures = resolve(thing), []
    for name, check in CONTRACT.items():
        try:
            check(variant)
        except (AssertionError, InputError, RuntimeError) as failure:
            failures.append(f"{name}: {failure}")
    if failures:
        raise AssertionError(
            f"{variant.spec} breaks {len(failures)} of {len(CONTRACT)} checks:\n" + "\n".join(failures)
        )
    return tuple(CONTRACT)


def _contract(check: Callable[[Variant], None]) -> Callable[[Variant], None]:
    CONTRACT[check.__name__] = check
    return check


def random_tokens(n: int, v: int, spread: float = 2.0, seed: int = 0) -> Tokens:
    """Tokens with random float64 logits of the given spread for the student and every other model, and every other field.

    Sequences have up to four tokens; every second one is the chosen sequence of a pair, where n > 1.
    """
    draw = torch.Generator().manual_seed(seed)

    def logits() -> Tensor:
        return spread * torch.randn(n, v, generator=draw, dtype=torch.float64)

    others = {name: logits() for name in MODELS}
    labels = torch.randint(v, (n,), generator=draw)
    sequence = torch.arange(n) // max(1, min(4, n // 2))  # two sequences at least, where there are two tokens
    if n > 1 and sequence[-1] % 2 == 0:  # the last would lack its partner
        sequence = sequence.clamp(max=int(sequence[-1]) - 1)
    given = {
        "sequence": sequence,
        "pair": sequence // 2,
        "chosen": sequence % 2 == 0,
        "critical": torch.rand(n, generator=draw) < 0.5,
        "hint": torch.rand(n, generator=draw) < 0.4,
        "advantage": torch.randn(n, generator=draw, dtype=torch.float64),
        "negatives": (torch.rand(n, v, generator=draw) < 0.2).scatter(1, labels[:, None], False),
    }
    return Tokens(logits=logits(), labels=labels, **given, **others)


def cases(scope: str = "token") -> Iterator[tuple[str, Tokens]]:
    """Tokens of every kind a method must stand: ordinary, extreme, tiny and empty, by name; the least pair has 2 tokens."""
    least = 2 if scope == "pair" else 1
    yield "random", random_tokens(64, 24)
    yield "sharp", random_tokens(64, 24, spread=10.0)
    yield "probes", probes()
    yield "p_y from 1e-12 to 1 - 1e-12", _edges()
    yield "V = 2", random_tokens(16, 2)
    yield f"N = {least}", random_tokens(least, 24)
    yield "N = 0", random_tokens(1, 24)[:0]
    yield "|z| = 1e4", _extreme()


def _edges() -> Tokens:
    """p_y from 1e-12 to 1 - 1e-12, the label's logit moved to make it so."""
    tokens = random_tokens(6, 24)
    p_y = torch.tensor([1e-12, 1e-9, 1e-3, 1 - 1e-3, 1 - 1e-9, 1 - 1e-12], dtype=torch.float64)
    index = tokens.labels[:, None]
    rest = tokens.logits.scatter(1, index, -torch.inf).logsumexp(-1)
    return tokens.replace(logits=tokens.logits.scatter(1, index, (rest + torch.logit(p_y))[:, None]))


def _extreme() -> Tokens:
    """Logits of plus and minus 1e4, in every model."""
    tokens = random_tokens(32, 24)
    return tokens.replace(**{name: 1e4 * getattr(tokens, name).sign() for name in ("logits", *MODELS)})


@_contract
def identity(variant: Variant) -> None:
    """The gradient of the printed loss is s (p - Q)."""
    for case, tokens in cases(variant.scope):
        target = variant.target(tokens)
        explicit = target.scale[:, None] * (tokens.probs - target.q)
        _close(gradient(variant.loss, tokens), explicit, f"gradient of the loss against s (p - Q), {case}")
        _close(target.grad, explicit, f"target.grad against s (p - Q), {case}")


@_contract
def sums_to_one(variant: Variant) -> None:
    """Q adds up to 1 on every token, except where the method declares that it sees raw logits."""
    for case, tokens in cases(variant.scope):
        q = variant.target(tokens).q
        size = q.abs().amax(-1).clamp(min=1)
        if variant.invariant:
            _close(q.sum(-1) / size, 1 / size, f"sum(Q), {case}")


@_contract
def simplex_as_declared(variant: Variant) -> None:
    """Q, at the method's own scale, is always a distribution exactly where that is declared."""
    wide = [random_tokens(256, 24, spread, seed=1) for spread in (1.0, 3.0, 10.0)]
    inside = [
        bool(variant.target(tokens).in_simplex.all()) for tokens in (*(t for _, t in cases(variant.scope)), *wide)
    ]
    if variant.simplex is True:
        assert all(inside), "declared simplex, but Q has negative entries on some tokens"
    if variant.simplex is False:
        assert not all(inside), "declared off the simplex, but Q was a distribution on every token tried"


@_contract
def finite(variant: Variant) -> None:
    """Loss, gradient, Q and scale are finite everywhere, and none is missing."""
    for case, tokens in cases(variant.scope):
        target = variant.target(tokens)
        parts = {"loss": variant.loss(tokens), "Q": target.q, "scale": target.scale, "gradient": target.grad}
        for part, value in (parts | {"autograd's gradient": gradient(variant.loss, tokens)}).items():
            assert len(value) == len(tokens), f"{part} has {len(value)} rows for {len(tokens)} tokens, {case}"
            assert bool(value.isfinite().all()), f"{part} is not finite, {case}"


@_contract
def invariant_to_a_constant(variant: Variant) -> None:
    """Adding a constant to a row of logits changes neither loss nor target, exactly where that is declared."""
    tokens = random_tokens(32, 24)
    by = torch.linspace(-7, 7, 32, dtype=torch.float64)[:, None]
    moved = tokens.replace(**{name: getattr(tokens, name) + by for name in ("logits", *MODELS)})
    if not variant.invariant:
        return
    _close(variant.loss(moved), variant.loss(tokens), "loss at z + c")
    _close(variant.target(moved).q, variant.target(tokens).q, "Q at z + c")


@_contract
def equivariant_under_permutation(variant: Variant) -> None:
    """Renaming the vocabulary renames Q and changes no loss."""
    tokens = random_tokens(32, 24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    named = {name: getattr(tokens, name)[:, order] for name in ("logits", *MODELS, "negatives")}
    renamed = tokens.replace(labels=order.argsort()[tokens.labels], **named)
    _close(variant.loss(renamed), variant.loss(tokens), "loss with a renamed vocabulary")
    _close(variant.target(renamed).q, variant.target(tokens).q[:, order], "Q with a renamed vocabulary")


@_contract
def scales_keep_the_gradient(variant: Variant) -> None:
    """``at`` changes (s, Q), never s (p - Q); the natural Q has no negative entry."""
    for case, tokens in cases(variant.scope):
        target = variant.target(tokens)
        wanted = ["unit", "natural"] + ["structural"] * (not isinstance(target.structural, str))
        for scale in wanted:
            other = target.at(scale)
            # pushed down from p = 0, a token's Q is below 0 at any scale
            there = ((target.probs > 0) | (target.grad <= 0)).all(-1) if scale == "natural" else slice(None)
            rounding = other.scale[:, None].clamp(min=1)  # a large s multiplies Q's last digit
            again = other.scale[:, None] * (other.probs - other.q)
            _close((again / rounding)[there], (target.grad / rounding)[there], f"s (p - Q) at {scale} scale, {case}")
            if scale == "natural":
                negative = other.negative_mass[there]
                assert bool((negative <= TOLERANCE).all()), f"Q at natural scale has negative entries, {case}"


@_contract
def weight_multiplies(variant: Variant) -> None:
    """``tokens.weight`` multiplies loss and scale, and leaves Q alone."""
    tokens = random_tokens(16, 24)
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
    tokens = random_tokens(24, 24)
    ids = {"token": torch.arange(24), "sequence": tokens.sequence, "pair": tokens.pair}.get(variant.scope)
    if ids is not None:
        whole = variant.target(tokens)
        for group in ids.unique()[[0, -1]]:
            kept = ids == group
            alone = variant.target(tokens[kept])
            _close(alone.q, whole.q[kept], f"Q of a {variant.scope} alone against Q among others")
            _close(alone.scale, whole.scale[kept], f"scale of a {variant.scope} alone")


@_contract
def constants_carry_no_gradient(variant: Variant) -> None:
    """The target is detached, and no gradient reaches another model."""
    tokens = random_tokens(8, 24)
    leaves = {name: getattr(tokens, name).clone().requires_grad_() for name in ("logits", *MODELS)}
    tokens = tokens.replace(**leaves)
    target = variant.target(tokens)
    held = [name for name in ("q", "scale", "grad", "trust") if getattr(target, name).requires_grad]
    assert not held, f"the target's {held} carries a gradient"
    variant.loss(tokens).sum().backward()
    reached = [name for name in MODELS if leaves[name].grad is not None and leaves[name].grad.abs().max() > 0]
    assert not reached, f"the gradient reaches {reached}, which must be constants"


@_contract
def spec_round_trips(variant: Variant) -> None:
    """A registered method's spec reads back as the same method at the same parameters."""
    if parse(variant.spec)[0] in names():
        again = get(variant.spec)
        assert (again.name, again.params, again.spec) == (variant.name, variant.params, variant.spec)


def _close(actual: Tensor, expected: Tensor, what: str) -> None:
    size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert_close(actual, expected, rtol=0.0, atol=TOLERANCE * size, msg=lambda text: f"{what}: {text}")
