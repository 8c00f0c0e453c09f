"""Rows labelled -100 among the rows of a loss that takes (N, V) logits."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qlens.conformance.harness import Reading, Specimen
from qlens.conformance.rules.rule import ROWS_ONLY, Failed, NotApplicable, Remark, relative
from qlens.conformance.wrappers import Around, as_it_is
from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE
from qlens.losses.calling import on_view
from qlens.losses.layout.names import ROLE
from qlens.losses.layout.views import View, token_ids

EQUALS = ("eq", "ne", "not_equal")
ORDERS = ("lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal")
EVERY = 5  # of the rows shown, one is ignored
NAMED = 128  # columns, so that an index of -100 is inside the vocabulary, as at real ones


def ignored_rows(loss: Specimen) -> str:
    """Test whether a loss of rows ignores rows labelled -100, which its mask leaves out if it takes one.

    Raises:
        Failed: rows that its mask leaves out have a gradient or count in its divisor.
        Remark: rows without a mask are trained, or count in its divisor.
        NotApplicable: it refuses such rows, takes no labels, or leaves the reduction to its caller.
    """
    if not knows_labels(loss):
        raise NotApplicable(ROWS_ONLY)
    masked = "mask" in loss.roles.values()
    rows = "rows that its mask leaves out" if masked else f"rows labelled {IGNORE}"
    loss, alone = _wide(loss)
    try:
        reading, ignored = among(loss, IGNORE)
    except InputError as error:
        raise NotApplicable(f"{ROWS_ONLY}; {rows} are refused: {error}") from error
    other_rows, pulls = reading.grad[~ignored], reading.grad[ignored].abs().amax(-1)
    many = int((~(pulls <= loss.nothing * alone.grad.abs().max())).sum())
    if many:
        raise _pulled(loss, reading, ignored, rows, float(pulls.max() / alone.grad.abs().max()))
    if relative(other_rows, alone.grad) <= loss.tolerance:
        return f"no gradient on {len(pulls)} {rows}, the others learn as without them"
    size = alone.grad.square().sum()
    times = float((other_rows * alone.grad).sum() / size)
    if relative(other_rows, times * alone.grad) > loss.tolerance:
        raise Remark(
            f"no gradient on {len(pulls)} {rows}, but with them among {len(ignored)} the others learn otherwise"
        )
    evidence = (
        f"{rows} count in what it divides by: with {len(pulls)} of them among {len(ignored)} the others learn {times:.4g} "
        "times as much"
    )
    if masked:
        raise Failed(evidence)
    if _looks_for_ignored(loss):
        raise Remark(evidence)
    raise NotApplicable(f"{ROWS_ONLY}; {evidence}")


def _looks_for_ignored(loss: Specimen) -> bool:
    """Whether a loss of rows handles ignored labels itself: by a parameter for their id, or by a comparison of labels."""
    parameters = inspect.signature(loss.fn.forward if isinstance(loss.fn, nn.Module) else loss.fn).parameters
    attributes = vars(loss.fn) if isinstance(loss.fn, nn.Module) else {}
    if any(ROLE.get(name.lower()) == "ignore" for name in (*parameters, *attributes)):
        return True
    with _Comparisons() as comparisons:
        among(loss, IGNORE)
    return comparisons.compares


class _Comparisons(TorchFunctionMode):
    """Notes whether tensors of integers are compared with a negative number, or with 0 or more by order."""

    def __init__(self):
        super().__init__()
        self.compares = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in (*EQUALS, *ORDERS):
            values = [*args, *kwargs.values()]
            tensors = [v for v in values if isinstance(v, Tensor) and v.ndim and not v.is_floating_point()]
            numbers = [float(v) for v in values if isinstance(v, int | float) or (isinstance(v, Tensor) and not v.ndim)]
            most = 0 if name in ORDERS else -1
            self.compares |= bool(tensors) and any(number <= most for number in numbers)
        return func(*args, **kwargs)


def knows_labels(loss: Specimen) -> bool:
    """Whether a loss of rows is given labels or a mask, which may say that a row is ignored."""
    return loss.kind != "tokens" and loss.declared != "pair" and bool({"labels", "mask"} & set(loss.roles.values()))


def _wide(loss: Specimen) -> tuple[Specimen, Reading]:
    """The loss at a vocabulary in which -100 is an index, where it accepts one, and its reading of supervised rows alone."""
    if loss.vocabulary < NAMED:
        try:
            wide = loss.with_vocabulary(NAMED)
            return wide, wide.read(wide.tokens())
        except InputError:  # it is written for one vocabulary
            pass
    return loss, loss.read(loss.tokens())


def among(loss: Specimen, label: int, around: Around = as_it_is) -> tuple[Reading, Tensor]:
    """A reading of ordinary rows with ignored ones between them, all M of them, and which these are.

    Masks and weights are 0 at ignored rows; they carry ``label``, unless a mask tells them from ordinary ids.
    """
    tokens, style = loss.tokens(), loss.style
    ignored = torch.arange(len(tokens) * EVERY // (EVERY - 1)) % EVERY == 0
    place, rows, size = (~ignored).nonzero()[:, 0], len(ignored), tokens.logits.shape[1]
    draw = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, size, generator=draw, dtype=torch.float64).to(tokens.logits)
    logits = logits.index_copy(0, place, tokens.logits.detach())
    labels = torch.full((rows,), 0 if style.clean else label).index_copy(0, place, tokens.labels)
    if loss.kind == "hidden":  # other models' hidden states stand at every row
        tokens = tokens[torch.zeros(rows, dtype=torch.long).index_copy(0, place, torch.arange(len(place)))]
        place = torch.arange(rows)
    count_argument = {loss.count: (~ignored).sum()} if loss.count and style.counted else {}
    with torch.enable_grad():
        leaf = logits.requires_grad_()
        ordinary_rows = tokens.with_logits(leaf[place])
        view = View(
            leaf.clone(), labels, ordinary_rows, place, (~ignored).long(), token_ids(torch.arange(rows), size), style
        )
        return loss.reading(on_view(around(loss.fn), loss.params, view, **count_argument), leaf), ignored


def _pulled(loss: Specimen, reading: Reading, ignored: Tensor, rows: str, share: float) -> Exception:
    """What to say of ignored rows that have a gradient, up to a share of the largest."""
    if "mask" in loss.roles.values():
        return Failed(f"{rows} have a gradient, up to {share:.2g} of the largest")
    token = _trained_as(loss, reading)
    if token is None:
        return NotApplicable(f"{ROWS_ONLY}; no label has a part in its gradient, that of {rows} neither")
    if token < 0:
        return Remark(f"{rows} have a gradient, up to {share:.2g} of the largest: the caller has to leave them out")
    index = f" ({IGNORE} counted from the end of the vocabulary)" if token else ""
    if reading.shape == ignored.shape:
        return NotApplicable(
            f"it returns a loss per row; {rows} have that of token {token}{index}, which whoever adds up leaves out"
        )
    return Remark(
        f"{rows} are trained as token {token}{index}, by up to {share:.2g} of the largest gradient: the caller has to "
        "leave them out"
    )


def _trained_as(loss: Specimen, reading: Reading) -> int | None:
    """The token whose label gives ignored rows the gradient that they have, -1 if none does, None if all do."""
    equal = []
    for token in (0, loss.vocabulary + IGNORE, loss.vocabulary - 1):
        try:
            same = token >= 0 and relative(among(loss, token)[0].grad, reading.grad) <= loss.tolerance
        except InputError:  # a negative index is refused, say
            same = False
        equal += [token] if same else []
    if {0, loss.vocabulary - 1} <= set(equal):
        return None
    return equal[0] if equal else -1
