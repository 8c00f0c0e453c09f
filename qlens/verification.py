"""Verification of a user's method, once, before the engine trains by its card: structure, identity and scope."""

import contextlib
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qlens.autograd import ordinary
from qlens.batch_losses import is_model_loss, place_matters
from qlens.errors import InputError
from qlens.guards import LossError
from qlens.lens import carried, gradient
from qlens.registry import Variant
from qlens.row_gradients import by_structure
from qlens.tokens import Tokens, spread
from qlens.trial_tokens import random_tokens
from qlens.variant import ALONE

logger = logging.getLogger(__name__)
SAMPLE = 16  # rows, spread over the batch
MANY, NARROW = 1024, 256  # random rows and entries, on which rows are seen to depend on each other
MOST = 2**21  # random logits at the batch's own vocabulary
UNDECLARED = "a loss of your own may look at all of them together; if it does not, register it with scope='token'"
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""How far two gradients of one loss may be apart, as a share of the largest entry, by dtype."""

_VERDICTS: WeakKeyDictionary[Callable, dict[tuple, str]] = WeakKeyDictionary()  # no callable is kept alive


def why_whole(
    variant: Variant, sample: Callable[[Tensor], Tokens], rows: int, block: int, fields: dict[str, Tensor]
) -> str:
    """Why the rows of a batch must not be cut into parts, "" where they may; proved once for every method of a user's own.

    Args:
        variant: the method; qlens' own are proved by the tests and not tried here.
        sample: tokens at some of the batch's rows, by index.
        rows: how many rows the batch has.
        block: how many rows would be taken at a time.
        fields: what is known of every row; a loss of pairs is tried on rows of both texts of some pairs.

    Raises:
        InputError: the declared structure is not the loss's, or target and printed loss have different gradients.
    """
    declared = why_declared_whole(variant)
    if not rows or (variant.built_in and not declared):
        return ""
    fn = variant.method.fn
    seen = [
        (name, value.ndim == 1 and bool((value != value[:1]).any()), value.dtype == torch.bool and bool(value.any()))
        for name, value in sorted(fields.items())
    ]
    cut = rows > block and variant.scope in ALONE
    run = min(rows, max(2 * block, 4 * SAMPLE)) if cut else 0  # rows next to each other that are tried
    card = (variant.spec, str(variant.structure), variant.scope, id(variant.method.printed))
    key = (*seen, *card, run.bit_length())
    try:
        verdicts = _VERDICTS.setdefault(fn, {})
    except TypeError:  # it has no weak reference or no hash: verified anew every time
        verdicts = {}
    if key not in verdicts and variant.built_in:
        verdicts[key] = declared
        _report(variant, declared)
    if key not in verdicts:
        with torch.inference_mode(False):
            few = ordinary(sample(_some(variant, rows, fields)))
        with (
            torch.inference_mode(False),
            torch.autocast(few.logits.device.type, enabled=False),
            variant.replay(few.logits.device).again(),
            warnings.catch_warnings(),
        ):  # a loss that draws numbers trains by the same ones, verified or not
            warnings.simplefilter("ignore")  # a statistic of one row, say
            _verify_layout(variant, few)
            _verify_gradient(variant, few)
            verdicts[key] = declared or _why_undeclared_whole(variant)
            if cut and not verdicts[key]:
                together = (ordinary(sample(index)) for index in _together(run, fields))
                tried = itertools.chain([few], together, _many(variant, few))
                verdicts[key] = next(filter(None, (_dependence(variant, tokens) for tokens in tried)), "")
        said = [reason for other, reason in verdicts.items() if other != key]
        if (cut or declared) and verdicts[key] not in said:
            _report(variant, verdicts[key])
    return verdicts[key]


def why_declared_whole(variant: Variant) -> str:
    """Why a method's rows cannot be taken a few at a time by its card alone, "" where they can."""
    if variant.scope in ALONE or variant.structure == "label":
        return ""
    if variant.scope == "batch":
        return f"it weighs tokens by a statistic of whole distributions (scope {variant.scope!r})"
    return (
        f"with scope {variant.scope!r} and structure 'dense' it may need whole distributions; if it is a function of the labels' "
        "log-probabilities alone, register it with structure='label'"
    )


def _why_undeclared_whole(variant: Variant) -> str:
    """Why rows cannot be taken a few at a time where nobody has said that they may; a target is tried for that."""
    return UNDECLARED if variant.derived and not variant.method.scope else ""


def _report(variant: Variant, reason: str) -> None:
    if reason:
        logger.warning("qlens holds the logits of a batch whole for %s: %s", variant.spec, reason)


def _many(variant: Variant, few: Tokens) -> list[Tokens]:
    """Many random rows with the fields of some given ones, all of which vary, in sequences of four.

    The vocabulary is small, so that there can be more rows than a loss asks for before it compares them; for a loss that is
    written for its own vocabulary it is that, and the rows are fewer.
    """
    vocabulary = few.logits.shape[1]
    sizes = [(MANY, min(vocabulary, NARROW)), (max(SAMPLE, MOST // vocabulary), vocabulary)]
    for number, v in sizes:
        trial = random_tokens(min(number, MANY), v)
        given = trial.fields() | {"weight": trial.require("advantage").abs() + 0.1}
        given = {name: value.to(few.logits.device) for name, value in given.items() if name in few.fields()}
        tokens = Tokens.unchecked(**given)
        with contextlib.suppress(InputError):
            _read(variant, tokens[:2])
            return [tokens]
    return []


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


def _together(run: int, fields: dict[str, Tensor]) -> Iterator[Tensor]:
    """Indices of rows that may depend on each other: so many next to each other, and some of one sequence and one pair."""
    yield torch.arange(run)
    for name in ("sequence", "pair"):
        if name in fields:
            group = (fields[name] == fields[name][0]).nonzero()[:, 0].cpu()
            if len(group) > 1:
                yield group[spread(len(group), SAMPLE)]


def _verify_layout(variant: Variant, tokens: Tokens) -> None:
    """Whether a loss sees a batch by its supervised rows alone, which is all that the engine has of it."""
    if is_model_loss(variant):
        raise InputError(
            f"{variant.spec} runs a model on its inputs, f(model, inputs), which hidden states and a head are not: train it "
            "with QTrainer(variant=...), or write it as a loss of f(logits, labels)"
        )
    style = variant.unreduced.style(variant.shown(tokens).upcast()) if variant.is_loss_alone(tokens) else None
    if style is not None and style.laid_out and (reason := place_matters(variant, tokens, style)):
        raise InputError(
            f"{variant.spec} sees whole batches (B, T, V), and {reason}: hidden states of single tokens do not say that. Train "
            "it with QTrainer(variant=...)"
        )


def _verify_gradient(variant: Variant, tokens: Tokens) -> None:
    """Whether what the engine would compute on these rows is the gradient of the printed loss."""
    if variant.is_loss_alone(tokens) and variant.structure == "dense":
        return  # it is computed by that very gradient
    replay = variant.replay(tokens.logits.device)
    wanted = gradient(variant.loss, tokens)
    with replay.again():
        got, values = by_structure(variant, tokens)
    off = (wanted - got).abs().amax(-1)
    wrong = ~(off <= _tolerance(wanted)) & wanted.isfinite().all(-1)  # NaN beside a number is wrong too
    if variant.structure != "dense":
        with torch.no_grad(), replay.again():
            losses = variant.loss(tokens).to(values.dtype)
        wrong |= (losses - values).abs() > _tolerance(losses)
    rows = wrong.nonzero()[:, 0].tolist()
    if not rows:
        return
    where = f"at a token with p_y = {float(tokens.label_probs[rows[0]]):.2g} ({len(rows)} of {len(tokens)} tokens)"
    alone = variant.method.printed is None and not variant.is_loss_alone(tokens)
    if variant.structure == "label" and alone and bool((off <= _tolerance(wanted)).all()):
        raise InputError(
            f"{variant.spec} declares structure='label', and its gradient is one of label probabilities, but its loss is not: "
            "the value s CE(Q, p) of a target alone sees the whole of p; write its printed loss, "
            f"@{variant.name}.loss, or leave structure out"
        )
    if variant.structure != "dense":
        raise InputError(
            f"{variant.spec} declares structure={variant.structure!r}, but has another loss or gradient {where}: "
            "declare structure='dense', or leave it out"
        )
    raise InputError(
        f"{variant.spec}: the gradient of its printed loss and s (p - Q) of its target differ, "
        f"by {float(off[rows[0]]):.2g} {where}: "
        f"run qlens.testing.check_variant({variant.name!r})"
    )


def _dependence(variant: Variant, tokens: Tokens) -> str:
    """How a row's gradient or loss depends on the rows it is computed with; "" where it does not."""
    n, at = len(tokens), torch.arange(len(tokens), device=tokens.logits.device)
    (grad, total), (again, _) = _read(variant, tokens), _read(variant, tokens)
    if _apart(grad, again):
        return "two calls on the same rows give two gradients"
    halves = [(at[: n // 2], at[n // 2 :]), (at[::2], at[1::2])]  # the second cut goes through every sequence
    parts = [*halves[0], *halves[1], at[:1], at[n // 3 : n // 3 + 2]]
    try:
        read = [_read(variant, tokens[part]) for part in parts]
    except LossError as error:
        return f"it takes {n} rows together, but not a few of them: {error}"
    for part, (alone, _) in zip(parts, read, strict=True):
        if _apart(alone, grad[part]):
            return _sentence(variant, "gradient", n, len(part))
    # values are compared as sums: a loss that reduces itself has none of its own for a row
    for first in (0, 2):
        sums = torch.stack([read[first][1], read[first + 1][1]])
        if bool((sums.sum() - total).abs() > _tolerance(torch.cat([sums, total[None]]))):
            return _sentence(variant, "loss", n, n // 2)
    return ""


def _sentence(variant: Variant, what: str, among: int, few: int) -> str:
    return (
        f"it is taken for scope={variant.scope!r}, but a token's {what} among {among} rows is another than among {few}: "
        "declare scope='batch' (or 'sequence', 'pair')"
    )


def _read(variant: Variant, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Gradient, (N, V), and summed loss as the engine takes them; N = 0 has none."""
    if not len(tokens):
        return torch.zeros_like(tokens.logits), tokens.logits.new_zeros(())
    with torch.no_grad():
        total = variant.loss(tokens).sum()
    grad = variant.target(tokens).grad
    return grad, total.to(grad.dtype)


def _apart(one: Tensor, other: Tensor) -> bool:
    alike = ((one - other).abs() <= _tolerance(other)) | (one == other) | (one.isnan() & other.isnan())
    return not bool(alike.all())


def _tolerance(values: Tensor) -> Tensor:
    """What counts as rounding beside these values."""
    size = values.nan_to_num(posinf=0.0, neginf=0.0).abs().amax()
    held = TOLERANCE[torch.float64 if carried(values) == torch.float64 else torch.float32]  # a loss may cast its logits
    return held * size.clamp(min=1e-30)
