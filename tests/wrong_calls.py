"""More mistakes in losses: what torch's functions are given, labels written on, rows left out. It adds to WRONG."""

import torch
import torch.nn.functional as F
from right_batches import divided, per_token, shifted
from wrong_losses import wrong


@wrong(functions="cross_entropy is given probabilities, where it takes logits")
def softmax_twice(logits, labels):
    return F.cross_entropy(logits.softmax(-1), labels)


@wrong(functions="kl_div is given probabilities, where it takes log-probabilities")
def forgets_the_log(outputs, labels, teacher, num_items_in_batch=None):
    z, y = shifted(outputs.logits, labels)
    kl = F.kl_div(z.softmax(-1), teacher[:, :-1].softmax(-1), reduction="none").sum(-1)
    return divided((kl * (y != -100)).sum(), y != -100, num_items_in_batch)


@wrong(functions="nll_loss is given entries above 0, where it takes log-probabilities")
def forgets_the_softmax(logits, labels):
    return F.nll_loss(logits, labels)


@wrong(functions="kl_div is given probabilities as a target, where log_target=True")
def mistakes_its_target(logits, labels, teacher):
    return F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean", log_target=True)


@wrong(row_order="a softmax over rows")
def normalises_over_rows(logits, labels):
    return F.nll_loss(logits.log_softmax(0), labels)


@wrong(inputs="labels")
def fills_ignored_labels(outputs, labels, num_items_in_batch=None):
    """Writes 0 for -100 on a view of the labels."""
    z, y = shifted(outputs.logits, labels)[0], labels[:, 1:]
    kept = y != -100
    y[~kept] = 0
    nll = F.cross_entropy(z.transpose(1, 2), y, reduction="none")
    return divided((nll * kept).sum(), kept, num_items_in_batch)


@wrong(row_count="those after row 512 have no gradient")
def truncates(outputs, labels, num_items_in_batch=None):
    z, y = (part.flatten(0, 1)[:512] for part in shifted(outputs.logits, labels))
    return divided(F.cross_entropy(z, y, reduction="sum"), y != -100, num_items_in_batch)


@wrong(all_masked="does not lead back to the logits")
def another_zero_without_labels(outputs, labels, num_items_in_batch=None):
    nll, kept = per_token(outputs.logits, labels)
    return divided((nll * kept).sum(), kept, num_items_in_batch) if kept.any() else torch.zeros((), requires_grad=True)
