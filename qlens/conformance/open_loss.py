"""Opening a loss: the vocabulary and precision that it accepts, and whether it has a gradient to test."""

from collections.abc import Iterator

import torch

from qlens.conformance.harness import COARSE_TOLERANCE, Reading, Specimen
from qlens.conformance.synthetic_batches import VOCABULARY, cast
from qlens.conformance.wrappers import watching
from qlens.core.errors import InputError
from qlens.core.scales import COARSE, carried
from qlens.losses.calling import written as writes
from qlens.losses.layout.layouts import Style
from qlens.losses.layout.signature import inputs
from qlens.losses.user_code import EndedError, numbers_of
from qlens.registry.variant import Variant

WIDER = (
    64,
    1024,
    50_304,
)  # vocabularies tried in turn where a loss refuses 24 columns: a top-50, a wide top-k, a token id
WIDEST = 300_000
WIDEST_HEAD = 2048  # for losses with a head, a square matrix of that size
NUDGE = {torch.float64: 1e-4, torch.float32: 1e-2}  # change of the logits; 0.1 in coarser types
SMALL = 256  # roundings of a softmax gradient, below which a gradient may be rounding alone
SIZE_ERRORS = (RuntimeError, IndexError, ValueError, AssertionError)


def specimen(variant: Variant) -> tuple[Specimen, str]:
    """The loss called once on ordinary rows, and the error at 24 columns if it needs a wider vocabulary.

    It is read in float32 where it refuses float64, and at a wider vocabulary where it refuses 24 columns.

    Raises:
        InputError: it cannot be called, or its gradient is missing, not finite or zero.
    """
    loss, ordinary, refused = _opened(variant)
    for what, values in (("value", ordinary.value), ("gradient", ordinary.grad)):
        if not bool(values.isfinite().all()):
            raise InputError(
                f"{variant.spec}: its {what} is NaN or infinite on ordinary logits: nothing can be checked"
            )
    loss.digits = carried(ordinary.grad)
    if loss.digits in COARSE:
        loss.tolerance = COARSE_TOLERANCE
    if _is_rounding(loss, ordinary):
        largest = float(ordinary.grad.abs().max())
        raise InputError(
            f"{variant.spec} teaches nothing: its gradient is zero up to rounding on ordinary logits (largest entry "
            f"{largest:.2g}, where softmax gradients are about 1): there is nothing to check"
        )
    return loss, refused


def _opened(variant: Variant) -> tuple[Specimen, Reading, str]:
    """The first vocabulary and precision at which a call succeeds, its reading, and the error of the first call.

    Raises:
        InputError: no call succeeds.
    """
    first: InputError | None = None
    written: list[str] = []
    messages: list[str] = []
    for vocabulary in _vocabularies(messages, _widest(variant)):
        for dtype in (torch.float64, torch.float32):  # a loss with float32 inside may refuse float64
            try:
                loss = Specimen(variant, dtype, vocabulary)
                reading = loss.read(loss.tokens(), around=watching(written))
                refused = "" if first is None or vocabulary == VOCABULARY else str(first)
                return loss, reading, refused
            except InputError as error:
                first = first or error
                messages.append(str(error.__cause__))
                if not _may_be_size(error):
                    break
        if not _may_be_size(first):
            break
    names = ", ".join(dict.fromkeys(_written(variant, written)))
    why = f" (it writes in place on {names})" if names else ""
    raise InputError(f"{variant.spec} cannot be checked{why}: {first}") from first


def _may_be_size(error: InputError) -> bool:
    """Whether an error may come from too few columns: one of the call, not of the backward pass."""
    if isinstance(error, EndedError):
        return False
    return isinstance(error.__cause__, SIZE_ERRORS) and not isinstance(error.__cause__, InputError)


def _written(variant: Variant, modified: list[str]) -> list[str]:
    """The arguments that a failing loss writes on, as seen in a call or in one on plain rows."""
    if modified:
        return modified
    try:
        return list(writes(variant.method.fn, variant.params, Specimen(variant).tokens(), Style()))
    except InputError:
        return []


def _widest(variant: Variant) -> int:
    """The widest vocabulary to try: a loss that is given a head, or a model with one, takes a square matrix."""
    return WIDEST_HEAD if variant.derived and inputs(variant.method.fn).kind in ("model", "hidden") else WIDEST


def _vocabularies(messages: list[str], widest: int) -> Iterator[int]:
    """24, then sizes named by error messages (weights per class, an index out of range), then wider ones."""
    sizes = {VOCABULARY}
    yield VOCABULARY
    for wider in WIDER:
        numbers = dict.fromkeys(int(number) for message in messages for number in numbers_of(message)[:20])
        for size in [size for number in numbers for size in (number, number + 1)][:12]:
            if VOCABULARY < size <= widest and size not in sizes:
                sizes.add(size)
                yield size
        if wider not in sizes and wider <= widest:
            sizes.add(wider)
            yield wider


def _is_rounding(loss: Specimen, ordinary: Reading) -> bool:
    """Whether a small gradient is rounding, so that a tiny change of the logits changes most of it."""
    size = ordinary.grad.norm()
    if not bool(size):
        return True
    if float(ordinary.grad.abs().max()) > SMALL * torch.finfo(loss.digits).eps:
        return False
    tokens = loss.tokens()
    draw = torch.Generator().manual_seed(11)
    noise = torch.randn(tokens.logits.shape, generator=draw, dtype=torch.float64) * NUDGE.get(loss.digits, 0.1)
    perturbed = loss.read(cast(tokens.replace(logits=tokens.logits + noise.to(tokens.logits)), loss.dtype)).grad
    return float((perturbed - ordinary.grad).norm() / size) > 0.5
