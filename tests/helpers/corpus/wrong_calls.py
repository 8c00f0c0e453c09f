"""Faulty losses: wrong inputs of torch's functions, writes on labels, rows left out; added to WRONG."""

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
    supervised = y != -100
    y[~supervised] = 0
    nll = F.cross_entropy(z.transpose(1, 2), y, reduction="none")
    return divided((nll * supervised).sum(), supervised, num_items_in_batch)


@wrong(row_count="those after row 512 have no gradient")
def truncates(outputs, labels, num_items_in_batch=None):
    z, y = (part.flatten(0, 1)[:512] for part in shifted(outputs.logits, labels))
    return divided(F.cross_entropy(z, y, reduction="sum"), y != -100, num_items_in_batch)


@wrong(all_masked="does not lead back to the logits")
def another_zero_without_labels(outputs, labels, num_items_in_batch=None):
    nll, supervised = per_token(outputs.logits, labels)
    return (
        divided((nll * supervised).sum(), supervised, num_items_in_batch)
        if supervised.any()
        else torch.zeros((), requires_grad=True)
    )


@wrong(functions="that of a softmax of probabilities: logits are normalised twice", extremes="p_y = 1")
def softmax_twice_by_hand(logits, labels):
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    q = p.exp() / p.exp().sum(-1, keepdim=True)
    return -q.gather(-1, labels[:, None]).log().mean()


@wrong(functions="that of a softmax of 10 times the probabilities")
def softmax_of_sharpened_probabilities(outputs, labels, num_items_in_batch=None):
    z, y = shifted(outputs.logits, labels)
    nll = F.cross_entropy(z.softmax(-1).transpose(1, 2) * 10, y, reduction="none")
    return divided(nll.sum(), y != -100, num_items_in_batch)


@wrong(functions="that of a softmax of sigmoids of the logits")
def cross_entropy_of_sigmoids(logits, labels):
    return F.cross_entropy(logits.sigmoid(), labels)


@wrong(functions="binary cross-entropy over the whole vocabulary, a sigmoid for each token")
def binary_cross_entropy(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.size(-1)).to(logits))


@wrong(functions="binary cross-entropy over the whole vocabulary, a sigmoid for each token")
def binary_cross_entropy_by_hand(logits, labels):
    y = F.one_hot(labels, logits.size(-1))
    return -(2 * y * F.logsigmoid(logits) + (1 - y) * F.logsigmoid(-logits)).sum(-1).mean()


@wrong(labels="every row learns the student's own most probable token (its argmax), not its label")
def learns_its_own_argmax(outputs, labels, num_items_in_batch=None):
    z, y = shifted(outputs.logits, labels)
    y = torch.where(y == -100, y, z.argmax(-1))
    nll = F.cross_entropy(z.transpose(1, 2), y, reduction="none")
    return divided(nll.sum(), y != -100, num_items_in_batch)


@wrong(labels="changing a label changes how much its row learns, not what")
def weighs_its_own_argmax_by_the_label(logits, labels):
    weight = logits.softmax(-1).gather(-1, labels[:, None])[:, 0].detach()
    return (weight * F.cross_entropy(logits, logits.argmax(-1), reduction="none")).mean()


@wrong(labels="its labels are ignored: changing a label changes no gradient")
def minimises_entropy(logits, labels):
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1).mean()


@wrong(labels="every row learns token 0, not its label")
def overwrites_its_labels(logits, labels):
    return F.cross_entropy(logits, torch.zeros_like(labels))


@wrong(labels="where the label is y, a row learns token y-1")
def counts_classes_from_one(logits, labels):
    return F.cross_entropy(logits, (labels - 1).clamp(min=0))
