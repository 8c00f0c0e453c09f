"""Rules on positions: which label a row learns, and that positions labelled -100 are ignored."""

import torch
from torch import Tensor

from qlens.conformance.harness import Specimen
from qlens.conformance.rules.ignored_rows import ignored_rows
from qlens.conformance.rules.rule import Failed, NotApplicable, Remark, rule, sees_no_batches
from qlens.conformance.synthetic_batches import WIDE, count, cut, relabelled
from qlens.core.supervised import IGNORE

SHIFTS = {
    True: {0: "it does not shift", 2: "shifted twice", -1: "shifted backwards"},
    False: {1: "it shifts labels that are already aligned", -1: "shifted backwards"},
}
REACTING = 10  # tokens in each text on which shifts are found; 4 at wide vocabularies
FAINT = 0.01  # of the largest reaction: a row that reacts less does not learn that label


@rule("the model is trained on another token than the next one")
def shift(loss: Specimen) -> str:
    """A row learns the next token."""
    strongest = {label: rows[0] for label, rows in reactions(loss).items() if rows}
    if not strongest:
        raise NotApplicable("no row's gradient follows which token a label is")
    tokens = _reacting(loss)
    if loss.laid_out and any(label // tokens != row // tokens for label, row in strongest.items()):
        raise Failed("a text's last row learns the first label of the next text: it shifts across the batch")
    expected, offsets = int(loss.laid_out), sorted({label - row for label, row in strongest.items()})
    if offsets != [expected]:
        learned = " and ".join(f"row t learns {_label(offset)}" for offset in offsets)
        name = SHIFTS[loss.laid_out].get(offsets[0]) if len(offsets) == 1 else None
        raise Failed(learned + (f": {name}" if name else ""))
    tokens_of_rows = loss.tokens()
    pulls = loss.read(tokens_of_rows).grad.gather(1, tokens_of_rows.labels[:, None])
    if bool((pulls >= 0).all()):
        raise Remark(
            f"row t makes {_label(expected)} less probable, in every one of {len(pulls)} rows: a sign is wrong, or it unlearns"
        )
    return f"row t learns {_label(expected)}: {len(strongest)} labels changed one at a time"


@rule("prompts, or other tokens meant to be ignored, are trained on")
def prompt(loss: Specimen) -> str:
    """Positions labelled -100 have no gradient."""
    if not loss.laid_out:
        return ignored_rows(loss)
    if reason := sees_no_batches(loss):
        raise NotApplicable(reason)
    if loss.labels_from_ids:
        raise Remark("it takes its labels from input_ids, whatever labels say: all but padding is learned, prompts too")
    texts = loss.unequal()
    reading = loss.read_batch(texts, count(texts))
    offsets = {label - row for label, rows in reactions(loss).items() for row in rows} or {1}
    masked = torch.cat([_masked(text.labels, offsets) for text in texts])
    pulled = reading.grad[masked].abs().amax(-1)
    many = int((pulled > loss.nothing * reading.grad.abs().max()).sum())
    if many:
        share = float(pulled.max() / reading.grad.abs().max())
        raise Failed(f"{many} of {len(pulled)} positions labelled -100 are pulled, by up to {share:.2g} of the largest")
    return f"no gradient on {len(pulled)} positions labelled -100"


def reactions(loss: Specimen) -> dict[int, list[int]]:
    """The rows that learn each label, the strongest first; rows and labels counted over the batch.

    One label is changed at a time, y to y'. A row learns it if its gradient turns, and turns by the columns y and y' above
    all. A row whose gradient only grows or shrinks has another weight, as in a sequence-weighted loss, but learns the same.
    Input ids stay as they are, so that another model sees the same, but where the loss takes its labels from them.

    Losses of batches see two texts without a prompt, any other a few rows.
    """
    return loss.cached(("reactions",), lambda: _reactions(loss))


def _reactions(loss: Specimen) -> dict[int, list[int]]:
    if loss.laid_out:
        size = _reacting(loss)
        number = 2 if loss.group <= 2 else loss.group
        texts = cut(loss.tokens(number * (size - 1)), size - 1)
        labels = torch.stack([text.labels.index_fill(0, torch.tensor([0]), 1) for text in texts])

        def read(labels: Tensor) -> Tensor:
            changed = [relabelled(text, own) for text, own in zip(texts, labels, strict=True)]
            return loss.read_batch(changed, number * (size - 1)).grad
    else:
        tokens = loss.tokens()
        labels = tokens.labels

        def read(labels: Tensor) -> Tensor:
            return loss.read(tokens.replace(labels=labels)).grad

    base = read(labels)
    least = loss.tolerance * base.abs().max()
    learners = {}
    for label in range(labels.numel()):
        changed = labels.flatten().clone()
        old = int(changed[label])
        changed[label] = new = (old + 7) % loss.vocabulary
        learners[label] = _learning(read(changed.view_as(labels)), base, old, new, float(least))
    return learners


def _learning(grad: Tensor, base: Tensor, old: int, new: int, least: float) -> list[int]:
    """The rows that are drawn from one label to another, the strongest first; failing these, the one pushed from it."""
    along = (grad * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True)
    turns = (grad - torch.where(along.isfinite(), along, 0.0) * base).norm(dim=-1) > least
    change = grad - base
    turns &= base.any(-1) & grad.any(-1)  # a row that is taken up or left out learns no other label
    by_label = change[:, old].abs() + change[:, new].abs() >= 0.5 * change.abs().sum(-1)
    pull = torch.where(turns & by_label, change[:, old] - change[:, new], 0.0)
    if not bool(pull.any()):
        return []
    if float(pull.max()) <= 0:
        return [int(pull.argmin())]
    order = pull.argsort(descending=True)
    return order[pull[order] > FAINT * pull.max()].tolist()


def _reacting(loss: Specimen) -> int:
    return REACTING if loss.vocabulary <= WIDE else 4


def _masked(labels: Tensor, offsets: set[int]) -> Tensor:
    """The positions whose labels, at every offset, are -100 or beyond the text."""
    masked = torch.ones_like(labels, dtype=torch.bool)
    for offset in offsets:
        at = torch.arange(len(labels)) + offset
        inside = (at >= 0) & (at < len(labels))
        masked[inside] &= labels[at[inside]] == IGNORE
    return masked


def _label(offset: int) -> str:
    return f"label t{offset:+d}" if offset else "its own label"
