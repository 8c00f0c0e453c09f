"""Rules on what a row's gradient may not depend on: the number of rows, its place, the id of its label."""

import math

import torch
from torch import Tensor

from qlens.conformance.harness import ROWS, Specimen
from qlens.conformance.rules.rule import Failed, NotApplicable, Remark, relative, rule, to
from qlens.conformance.synthetic_batches import WIDE, count
from qlens.core.errors import InputError
from qlens.core.numerics import spread
from qlens.core.tokens import Tokens

SHOWN = 8  # rows that are repeated
COPIES = (2, 5, 17, 65, 257)
CUT_OFF = 64  # rows without a gradient at the end of many that show truncation rather than selection
ENTRIES = 2**22  # logits in one call
NEAR = 1e-3  # relative difference of two factors that count as equal
OTHER_ROWS = 6  # further rows that are tried where some labels differ from the others
SLIGHT = 0.15  # relative change of a factor, less than that of chunks with divisors of their own
TURNS = 0.1  # share of the largest gradient beyond which there is no common factor


@rule("the same text trains at another rate in a longer batch: the loss adds up means of chunks, or divides twice")
def row_count(loss: Specimen) -> str:
    """With more rows, a sum stays a sum and a mean stays a mean."""
    if loss.variant.compares_pairs or (loss.scope in ("batch", "pair") and not loss.laid_out):
        raise NotApplicable(f"scope {loss.scope}: a row's gradient depends on the others by design")
    most = ENTRIES // (SHOWN * loss.vocabulary)
    copies = [m for m in COPIES if m <= most] or [2]
    alone = loss.scope in ("batch", "pair")  # such a loss wants several texts
    factors, off = _factors(loss, copies, one_text=not alone)
    if (
        off > TURNS and loss.laid_out and not alone
    ):  # rows next to each other may be read together: then every copy is a text
        factors, off = _factors(loss, copies, one_text=False)
    copies = copies[: len(factors)]
    sizes = [SHOWN * m for m in copies]
    _all_learn(loss, sizes[-1])
    if all(abs(times - 1) <= NEAR + loss.tolerance for times in factors):
        reduction = "a mean, whatever the number of rows"
    elif all(abs(times / m - 1) <= NEAR + loss.tolerance for times, m in zip(factors, copies, strict=True)):
        reduction = "a sum, whatever the number of rows"
    elif loss.laid_out and all(
        abs(times / (m * (SHOWN + 1) / (m * SHOWN + 1)) - 1) <= NEAR for times, m in zip(factors, copies, strict=True)
    ):  # a text has one position more than it has predicted labels
        reduction = "a mean over positions, whatever the number of rows"
    elif (statistic := _sample(factors, copies)) is not None:
        raise Remark(f"a mean, times what {statistic} makes of it: with {sizes[-1]} rows {factors[-1]:.4g}")
    elif (power := _power(factors, copies)) is not None:
        raise Remark(
            f"between a mean and a sum: with m times as many rows in a text their gradient is m^{power:.3g} times as large"
        )
    elif max(abs(times - 1) for times in factors) <= SLIGHT:
        raise Remark(
            f"a mean but for {max(abs(times - 1) for times in factors):.1%}, as where weights are normalised over the batch"
        )
    elif off > TURNS:
        raise NotApplicable("a row's gradient depends on the other rows: with more of them it turns")
    else:
        deviations = [(size, times) for size, times in zip(sizes, factors, strict=True) if abs(times - 1) > NEAR]
        n, times = deviations[0]
        m, more = deviations[-1]
        last = f", with {m} {more:.4g} times" if m != n else ""
        raise Failed(
            f"neither a sum nor a mean: with {n} rows, {SHOWN} of them repeated, their gradient is {times:.4g} times "
            f"that of {SHOWN} rows{last}"
        )
    return f"{reduction}: {SHOWN} to {sizes[-1]} rows tried"


def _sample(factors: list[float], copies: list[int]) -> str | None:
    """The statistic of a few values of the batch that explains these factors of a mean, in words; or None."""
    for root, words in (
        (0.5, "the standard deviation (of a sample) of {} values"),
        (-1, "a comparison of {} with each other"),
    ):
        for values in range(2, SHOWN + 1):
            expected = [((m * values - 1) / (m * (values - 1))) ** root for m in copies]
            if all(abs(times / each - 1) <= NEAR for times, each in zip(factors, expected, strict=True)):
                return words.format(values)
    return None


@rule(
    "rows learn more or less by where they stand among the others, as where chunks of unequal size have means of their own"
)
def row_order(loss: Specimen) -> str:
    """Rows, or texts, in another order have the same gradient."""
    if loss.scope in ("batch", "pair"):
        raise NotApplicable(f"scope {loss.scope}: a row's gradient depends on the others by design")
    if loss.laid_out:
        texts = loss.unequal()
        order = [6, 1, 4, 7, 0, 5, 2, 3]
        base, moved = (
            list(loss.read_batch(shown, count(texts)).grad.split([len(text.labels) for text in shown]))
            for shown in (texts, [texts[i] for i in order])
        )
        base = torch.cat([base[i] for i in order])
        moved = torch.cat(moved)
    else:
        tokens = loss.tokens(ROWS - 1)  # a number that no chunk size divides
        if loss.variant.scope == "sequence" or {"sequence", "pair"} & set(loss.fields):
            index = (tokens.sequence.max() - tokens.sequence).argsort(stable=True)  # type: ignore[union-attr]
        else:
            index = torch.arange(len(tokens)).flip(0)
        base, moved = loss.read(tokens).grad[index], loss.read(tokens[index]).grad
    off = relative(moved, base)
    if off <= loss.tolerance:
        _rows_alone(loss)
        return f"the same gradient {to(off)} in another order"
    size = base.square().sum(-1)
    times = (moved * base).sum(-1) / size
    learning = size > (loss.tolerance**2) * size.max()
    if relative((times[:, None] * base)[learning], moved[learning]) > max(10 * loss.tolerance, NEAR):
        raise Remark("a row's gradient depends on the rows around it: in another order it turns")
    low, high = float(times[learning].min()), float(times[learning].max())
    raise Failed(f"in another order rows weigh {low:.4g} to {high:.4g} times as much: they are weighed by their place")


def _rows_alone(loss: Specimen) -> None:
    """Test whether the gradient of a row depends on other rows.

    Raises:
        Failed: its rows are normalised together, instead of the entries of each.
        Remark: the gradient of a row depends on the logits or labels of others.
    """
    if loss.laid_out or loss.scope != "token":
        return  # losses of batches: see coupling
    tokens = loss.tokens()
    other = torch.arange(len(tokens)) % 3 == 0
    logits = torch.where(other[:, None], tokens.logits.roll(5, -1), tokens.logits)
    labels = torch.where(other, (tokens.labels + 7) % loss.vocabulary, tokens.labels)
    base, after = loss.read(tokens).grad, loss.read(tokens.replace(logits=logits, labels=labels)).grad
    off = float((after - base)[~other].abs().max() / base.abs().max())
    if off <= loss.tolerance:
        return
    by_row, by_column = (float(base.sum(dim).abs().max() / base.abs().max()) for dim in (-1, 0))
    if by_column <= loss.nothing < by_row:
        raise Failed(
            "the gradients of an entry sum to zero over the rows, not those of a row over its entries: a softmax over rows",
            "probabilities are compared between tokens of the batch, and no distribution over the vocabulary is learned",
        )
    raise Remark(
        f"a row's gradient depends on the logits or labels of other rows (by {off:.2g} of the largest): in smaller "
        "batches it is another"
    )


@rule("")
def label_ids(loss: Specimen) -> str:
    """The same logits around another label give the same gradient."""
    if {"pair", "chosen"} & set(loss.fields) or loss.scope in ("batch", "pair"):
        raise NotApplicable(f"scope {loss.scope}: a row's gradient depends on the others by design")
    ids = _some_ids(loss.vocabulary)
    for row in range(1 + OTHER_ROWS):  # a clipped row may have no gradient
        forward = _by_id(loss, ids, row)
        usual = forward[forward.norm(dim=-1).argsort()[len(ids) // 2]]
        if bool(usual.any()):
            break
    else:
        raise NotApplicable("most tokens have no gradient where all are alike")
    size = usual.square().sum()
    odd = _odd(loss, forward, usual)
    if odd.any():  # a loss that picks some of equal rows picks others in another order
        odd &= _odd(loss, _by_id(loss, ids, row, flipped=True), usual)
    if odd.any():
        odd &= _odd_everywhere(loss, ids)
    if not odd.any():
        return f"the same for every token as a label ({len(ids)} of {loss.vocabulary} tried)"
    times = (forward * usual).sum(-1) / size
    straight = relative(times[:, None] * usual, forward) <= max(10 * loss.tolerance, NEAR)
    if straight and int(odd.sum()) <= len(ids) // 2:
        weights = ", ".join(f"{int(ids[k])}: {float(times[k]):.4g}" for k in odd.nonzero()[:8, 0].tolist())
        more = f" and {int(odd.sum()) - 8} more" if int(odd.sum()) > 8 else ""
        raise Remark(f"it depends on which token the label is, by a weight (others 1): {weights}{more}")
    if straight:
        raise Remark(f"it depends on which token the label is, by weights from {times.min():.4g} to {times.max():.4g}")
    raise Remark(
        "it depends on which tokens they are, and not by a weight alone: it looks tokens up, or runs another model"
    )


def _odd_everywhere(loss: Specimen, ids: Tensor) -> Tensor:
    """The ids whose gradient differs from the usual whatever the logits are.

    A loss that selects some of equal rows by rounding selects others for other logits.
    """
    odd = torch.ones(len(ids), dtype=torch.bool)
    for row in range(1, 1 + OTHER_ROWS):
        grads = _by_id(loss, ids, row)
        usual = grads[grads.norm(dim=-1).argsort()[len(ids) // 2]]
        if bool(usual.any()):
            odd &= _odd(loss, grads, usual)
            odd &= _odd(loss, _by_id(loss, ids, row, flipped=True), usual)
        if not odd.any():
            break
    return odd


def _some_ids(vocabulary: int) -> Tensor:
    """Token ids to test: the first, among them special tokens, the last, and some between; all of a small vocabulary."""
    part = 64 if vocabulary <= WIDE else 8
    if vocabulary <= 3 * part:
        return torch.arange(vocabulary)
    between = spread(vocabulary, part)
    return torch.cat([torch.arange(part), between, torch.arange(vocabulary - part, vocabulary)]).unique()


def _by_id(loss: Specimen, ids: Tensor, row: int, flipped: bool = False) -> Tensor:
    """The gradient for every label id, with the same logits around the label, rotated back, (ids, V)."""
    size = loss.vocabulary
    one = loss.tokens(1 + OTHER_ROWS)[row : row + 1] if row else loss.tokens(1)
    one = one.replace(labels=torch.tensor([0]))
    rotated = (torch.arange(size) - ids[:, None]) % size
    fields = {}
    for name, value in one.fields().items():
        if value.ndim == 1:
            fields[name] = value.expand(len(ids))
        else:
            fields[name] = value[0][rotated]
    tokens = Tokens(**fields | {"labels": ids, "sequence": torch.arange(len(ids))})
    order = torch.arange(len(ids)).flip(0) if flipped else torch.arange(len(ids))
    grad = loss.read(tokens[order], per_text=1).grad[order]
    return grad.gather(1, (torch.arange(size) + ids[:, None]) % size)


def _odd(loss: Specimen, grads: Tensor, usual: Tensor) -> Tensor:
    return (grads - usual).abs().amax(-1) > max(loss.tolerance, 1e-6) * usual.abs().max()


def _all_learn(loss: Specimen, rows: int) -> None:
    """Test whether the last of many rows have a gradient.

    Raises:
        Failed: none after some row has one, in any of a few draws of the logits.
    """
    if loss.scope in ("batch", "pair") or rows < 2 * CUT_OFF:
        return
    tokens, last = loss.tokens(rows), 0
    for turn in range(4):  # a loss that selects rows by their logits selects others then
        rolled = tokens.replace(logits=tokens.logits.roll((7 * turn, turn), (0, 1)))
        learning = loss.read(rolled, per_text=SHOWN // 4).grad.any(-1).nonzero()
        last = max(last, int(learning.max()) + 1 if len(learning) else 0)
        if not last or rows - last < CUT_OFF:
            return
    raise Failed(
        f"of {rows} rows those after row {last} have no gradient, whatever their logits are",
        "the end of a long batch is silently cut off",
    )


def _power(factors: list[float], copies: list[int]) -> float | None:
    """The exponent between 0 and 1 by which the gradient grows with the number of rows; None where one is not enough."""
    if len(factors) < 2 or min(factors) <= 0:
        return None
    powers = [math.log(times) / math.log(m) for times, m in zip(factors, copies, strict=True)]
    return powers[-1] if max(powers) - min(powers) <= NEAR and 0 < powers[-1] < 1 else None


def _factors(loss: Specimen, copies: list[int], one_text: bool) -> tuple[list[float], float]:
    """The factors by which the gradient grows as rows are repeated, and the largest deviation from them."""
    from qlens.losses.layout.layouts import Layout, tiled

    if SHOWN % loss.group:
        raise NotApplicable(f"it takes texts in groups of {loss.group}, and is tried on {SHOWN} rows")
    some = loss.tokens(SHOWN)

    def read(times: int) -> Tensor:
        many = tiled(some, Layout(copies=times))
        repeated = loss.read(many, per_text=len(many) if one_text else SHOWN // 4)
        return repeated.grad.view(times, SHOWN, -1).sum(0)

    base, factors, off = read(1), [], 0.0
    for times in copies:
        try:
            grad = read(times)
        except InputError as error:  # a loss may refuse longer batches
            if factors:
                break
            raise NotApplicable(f"with {times * SHOWN} rows {error}") from error
        factors.append(float((grad * base).sum() / base.square().sum()))
        off = max(off, relative(grad, factors[-1] * base))
    return factors, off
