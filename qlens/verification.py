"""Verification of a user's method, once, before the engine trains by its card: structure, identity and scope."""

import logging
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qlens.autograd import ordinary
from qlens.draws import Replay
from qlens.errors import InputError
from qlens.lens import gradient
from qlens.registry import Variant
from qlens.row_gradients import by_structure
from qlens.tokens import Tokens, spread
from qlens.variant import ALONE

logger = logging.getLogger(__name__)
SAMPLE = 16  # rows, spread over the batch
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
    seen = [(name, value.dtype == torch.bool and bool(value.any())) for name, value in sorted(fields.items())]
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
            Replay(few.logits.device).again(),
        ):  # a loss that draws numbers trains by the same ones, verified or not
            _verify_gradient(variant, few)
            tried = (few, *(ordinary(sample(index)) for index in _together(run, fields))) if cut else ()
            verdicts[key] = declared or next(filter(None, (_dependence(variant, tokens) for tokens in tried)), "")
        _report(variant, verdicts[key])
    return verdicts[key]


def why_declared_whole(variant: Variant) -> str:
    """Why a method's rows cannot be taken a few at a time by its card alone, "" where they can."""
    if variant.scope in ALONE or variant.structure == "label":
        return ""
    return f"it weighs tokens by a statistic of whole distributions (scope {variant.scope!r})"


def _report(variant: Variant, reason: str) -> None:
    if reason:
        logger.warning("qlens holds the logits of a batch whole for %s: %s", variant.spec, reason)


def _some(variant: Variant, rows: int, fields: dict[str, Tensor]) -> Tensor:
    """Indices of a few rows, spread over the batch; of pairs, two rows of both texts."""
    if variant.scope in ALONE or not {"pair", "chosen"} <= fields.keys():
        return spread(rows, SAMPLE)
    pair, chosen = fields["pair"], fields["chosen"].bool()
    ids = pair.unique()
    sides = [(pair == i) & (chosen == side) for i in ids[spread(len(ids), SAMPLE // 2)] for side in (True, False)]
    return torch.cat([side.nonzero()[:2, 0] for side in sides]).sort().values


def _together(run: int, fields: dict[str, Tensor]) -> Iterator[Tensor]:
    """Indices of rows that may depend on each other: so many next to each other, and some of one sequence and one pair."""
    yield torch.arange(run)
    for name in ("sequence", "pair"):
        if name in fields:
            group = (fields[name] == fields[name][0]).nonzero()[:, 0].cpu()
            if len(group) > 1:
                yield group[spread(len(group), SAMPLE)]


def _verify_gradient(variant: Variant, tokens: Tokens) -> None:
    """Whether what the engine would compute on these rows is the gradient of the printed loss."""
    if variant.is_loss_alone(tokens) and variant.structure == "dense":
        return  # it is computed by that very gradient
    replay = Replay(tokens.logits.device)
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
    n = len(tokens)
    (grad, total), (again, _) = _read(variant, tokens), _read(variant, tokens)
    if _apart(grad, again):
        return "two calls on the same rows give two gradients"
    halves = [slice(0, n // 2), slice(n // 2, n)]
    parts = {
        (part.start, part.stop): _read(variant, tokens[part])
        for part in (*halves, slice(0, 1), slice(n // 3, n // 3 + 2))
    }
    for (start, stop), (alone, _) in parts.items():
        if _apart(alone, grad[start:stop]):
            return _sentence(variant, "gradient", n, stop - start)
    # values are compared as sums: a loss that reduces itself has none of its own for a row
    sums = torch.stack([parts[half.start, half.stop][1] for half in halves])
    apart = (sums.sum() - total).abs() > _tolerance(torch.cat([sums, total[None]]))
    return _sentence(variant, "loss", n, n // 2) if bool(apart) else ""


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
    return bool(((one - other).abs() > _tolerance(other)).any())


def _tolerance(values: Tensor) -> Tensor:
    """What counts as rounding beside these values."""
    size = values.nan_to_num(posinf=0.0, neginf=0.0).abs().amax()
    return TOLERANCE[values.dtype] * size.clamp(min=1e-30)
