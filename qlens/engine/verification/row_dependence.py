"""Dependence between rows: whether a token's gradient or loss changes with the other rows of its batch."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qlens.core.autograd import ordinary
from qlens.core.errors import InputError
from qlens.core.numerics import spread
from qlens.core.probes.trial_tokens import random_tokens
from qlens.core.scales import carried
from qlens.core.tokens import MODELS, Tokens
from qlens.losses.user_code import LossError
from qlens.registry import Variant

SAMPLE = 16  # rows, spread over the batch
TRIAL_ROWS, TRIAL_VOCABULARY = 1024, 256  # of random tokens
TRIAL_ENTRIES = 2**21  # of random tokens over the batch's own vocabulary
BATCH_ENTRIES = 2**24  # logits of all rows of a batch at most; of a larger one, some entries of the vocabulary
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""How far two gradients of one loss may be apart, as a share of the largest entry, by dtype."""


def why_dependent(
    variant: Variant,
    samples: Tokens,
    sample: Callable[[Tensor], Tokens],
    rows: int,
    block: int,
    fields: dict[str, Tensor],
) -> str:
    """How a row's gradient or loss depends on the others of its batch, "" where it does not.

    Args:
        variant: the method.
        samples: rows spread over the batch.
        sample: tokens at some of the batch's rows, by index.
        rows: how many rows the batch has.
        block: how many rows would be taken at a time.
        fields: per-token fields of the rows.
    """
    run = min(rows, max(2 * block, 4 * SAMPLE))  # consecutive rows
    trials = [samples, *(ordinary(sample(index)) for index in _possibly_dependent(run, fields))]
    for tokens in (*trials, *_trial_tokens(variant, samples)):
        if reason := _dependence(variant, tokens):
            return reason
    return _dependence_among_all(variant, sample, rows, block)


def _trial_tokens(variant: Variant, like: Tokens) -> list[Tokens]:
    """Random rows with the fields of ``like``, in sequences of four.

    The vocabulary is small, so that there are many rows: a loss may compare them only where there are enough. For a loss that
    is written for one vocabulary it is that one, and the rows are fewer.
    """
    vocabulary = like.logits.shape[1]
    sizes = [(TRIAL_ROWS, min(vocabulary, TRIAL_VOCABULARY)), (max(SAMPLE, TRIAL_ENTRIES // vocabulary), vocabulary)]
    for number, v in sizes:
        trial = random_tokens(min(number, TRIAL_ROWS), v)
        fields = trial.fields() | {"weight": trial.require("advantage").abs() + 0.1}
        fields = {name: value.to(like.logits.device) for name, value in fields.items() if name in like.fields()}
        tokens = Tokens.unchecked(**fields)
        with contextlib.suppress(InputError):
            _read(variant, tokens[:2])
            return [tokens]
    return []


def _possibly_dependent(run: int, fields: dict[str, Tensor]) -> Iterator[Tensor]:
    """Indices of rows that may depend on each other: ``run`` consecutive ones, and some of one sequence and of one pair."""
    yield torch.arange(run)
    for name in ("sequence", "pair"):
        if name in fields:
            group = (fields[name] == fields[name][0]).nonzero()[:, 0].cpu()
            if len(group) > 1:
                yield group[spread(len(group), SAMPLE)]


def _dependence_among_all(variant: Variant, sample: Callable[[Tensor], Tokens], rows: int, block: int) -> str:
    """How a row's gradient or loss depends on the others of its batch, on all rows of the batch together.

    Where these have more than ``BATCH_ENTRIES`` logits, on some entries of the vocabulary; for a loss that is written for one
    vocabulary, on fewer rows.
    """
    first = ordinary(sample(torch.zeros(1, dtype=torch.long)))
    vocabulary = first.logits.shape[1]
    columns = spread(vocabulary, max(BATCH_ENTRIES // rows, 2)).to(first.logits.device)
    narrow = len(columns) < vocabulary
    if narrow:
        try:
            _read(variant, _on_columns(first, columns, 0))
        except InputError:
            rows, narrow = max(BATCH_ENTRIES // vocabulary, 2), False
    parts: list[Tokens] = []
    for start in range(0, rows, block):
        part = ordinary(sample(torch.arange(start, min(start + block, rows))))
        parts.append(_on_columns(part, columns, start) if narrow else part)
    names = parts[0].fields()
    tokens = Tokens.unchecked(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
    del parts
    return _dependence(variant, tokens, twice=False)


def _on_columns(tokens: Tokens, columns: Tensor, start: int) -> Tokens:
    """Rows on some entries of the vocabulary; the label's logits replace those of one of the entries.

    Args:
        tokens: the rows.
        columns: the entries.
        start: the number of the first row, so that neighbouring rows have different labels.
    """
    number = torch.arange(start, start + len(tokens), device=columns.device)
    labels, own = (number % len(columns))[:, None], tokens.labels[:, None].long()
    wide = {
        name: value[:, columns].scatter(1, labels, value.gather(1, own))
        for name, value in tokens.fields().items()
        if name in ("logits", "negatives", *MODELS)
    }
    return Tokens.unchecked(**{**tokens.fields(), **wide, "labels": labels[:, 0]})


def _dependence(variant: Variant, tokens: Tokens, twice: bool = True) -> str:
    """How a row's gradient or loss depends on the rows it is computed with; "" where it does not.

    The rows are cut into halves in three ways (consecutive, alternating, random), so that any two are apart in one of them.
    """
    n, at = len(tokens), torch.arange(len(tokens), device=tokens.logits.device)
    grad, total = _read(variant, tokens)
    if twice and differ(grad, _read(variant, tokens)[0]):
        return "two calls on the same rows give two gradients"
    random_half = (torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5).to(at.device)
    halves = [(at[: n // 2], at[n // 2 :]), (at[::2], at[1::2]), (at[random_half], at[~random_half])]
    parts = [*(half for cut in halves for half in cut), at[:1], at[n // 3 : n // 3 + 2]]
    try:
        readings = [_read(variant, tokens[part]) for part in parts]
    except LossError as error:
        return f"it takes {n} rows together, but not a few of them: {error}"
    for part, (alone, _) in zip(parts, readings, strict=True):
        if len(part) and differ(alone, grad[part]):
            return _sentence(variant, "gradient", n, len(part))
    # values are compared as sums: a loss that reduces itself has none of its own for a row
    for first in range(0, 2 * len(halves), 2):
        sums = torch.stack([readings[first][1], readings[first + 1][1]])
        if bool((sums.sum() - total).abs() > tolerance(torch.cat([sums, total[None]]))):
            return _sentence(variant, "loss", n, n // 2)
    return ""


def _sentence(variant: Variant, what: str, among: int, few: int) -> str:
    return (
        f"its scope is {variant.scope!r}, but a token's {what} differs between {among} rows and {few} of them: "
        "declare scope='batch' (or 'sequence', 'pair')"
    )


def _read(variant: Variant, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Gradient, (N, V), and summed loss of some rows; zero for none."""
    if not len(tokens):
        return torch.zeros_like(tokens.logits), tokens.logits.new_zeros(())
    with torch.no_grad():
        total = variant.loss(tokens).sum()
    grad = variant.target(tokens).grad
    return grad, total.to(grad.dtype)


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two gradients differ by more than rounding."""
    equal = ((one - other).abs() <= tolerance(other)) | (one == other) | (one.isnan() & other.isnan())
    return not bool(equal.all())


def tolerance(values: Tensor) -> Tensor:
    """Rounding of such values."""
    size = values.nan_to_num(posinf=0.0, neginf=0.0).abs().amax()
    share = TOLERANCE[
        torch.float64 if carried(values) == torch.float64 else torch.float32
    ]  # a loss may cast its logits
    return share * size.clamp(min=1e-30)
