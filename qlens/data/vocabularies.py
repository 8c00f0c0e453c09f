"""Vocabularies that are padded differently over one tokenizer: another model's logits, made as wide as the model's."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.core.errors import InputError
from qlens.data.compatibility import check_same_tokenizer, vocabulary_size

PADDING = -100.0  # the logit of an entry that is there for its width alone


def match_vocabulary(
    width: int,
    other: PreTrainedModel,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    others: PreTrainedTokenizerBase,
) -> str:
    r"""Give another model's logits the width of the model's, where both share a tokenizer and only the padding differs.

    Vocabularies are padded beyond the tokenizer for speed (151,936 and 152,064 entries over Qwen's one tokenizer). Entries
    that only the other has are cut off: no token is theirs, and its softmax is over the rest. Entries that only the model
    has get a logit of ``PADDING`` from the other: a probability that is 0 in float32, with a finite logarithm, so that
    reverse KL stays finite. There Q_k = 0 and the gradient p_k - Q_k takes from these entries what the model gives them,
    as labels do. The model itself, and so its loss without another, is left as it is.

    Args:
        width: of the model's logits.
        other: a causal language model; it gets another head, in place, that shares its weights where it is cut.
        name: the other's, for messages.
        tokenizer, others: the model's and the other's.

    Returns:
        What was done, in a sentence; empty where the widths are the same.

    Raises:
        InputError: the tokenizers differ, a token is beyond one of the vocabularies, or the other's head is not linear.
    """
    check_same_tokenizer(tokenizer, others)
    mine, its = width, vocabulary_size(other)
    if mine == its:
        return ""
    top = max(tokenizer.get_vocab().values())
    head: Any = other.get_output_embeddings()
    if top >= min(mine, its) or type(head) is not nn.Linear:
        what = f"its tokenizer has a token {top}" if top >= min(mine, its) else "its head is not linear"
        raise InputError(f"{name} has a vocabulary of {its}, the model of {mine}, and {what}: they cannot be matched")
    with torch.no_grad():
        other.set_output_embeddings(_cut(head, mine) if its > mine else _padded(head, mine, _logit_scale(other)))
    other.config.get_text_config().vocab_size = mine
    done = f"cut to {mine}" if its > mine else f"padded to {mine} with entries of probability 0"
    return f"{name}: a vocabulary of {its} over the model's own tokenizer, {done}"


def _cut(head: nn.Linear, size: int) -> nn.Linear:
    """The first entries of a head, over the same weights."""
    cut = nn.Linear(1, 1, bias=head.bias is not None, device="meta")
    cut.weight = nn.Parameter(head.weight[:size], requires_grad=False)
    if head.bias is not None:
        cut.bias = nn.Parameter(head.bias[:size], requires_grad=False)
    cut.in_features, cut.out_features = head.in_features, size
    return cut


def _padded(head: nn.Linear, size: int, scale: float) -> nn.Linear:
    """A head with further entries, whose logits are ``PADDING``."""
    more = size - head.out_features
    padded = nn.Linear(1, 1, device="meta")
    bias = head.weight.new_zeros(head.out_features) if head.bias is None else head.bias
    weight = torch.cat([head.weight, head.weight.new_zeros(more, head.in_features)])
    padded.weight = nn.Parameter(weight, requires_grad=False)
    padded.bias = nn.Parameter(torch.cat([bias, bias.new_full((more,), PADDING / scale)]), requires_grad=False)
    padded.in_features, padded.out_features = head.in_features, size
    return padded


def _logit_scale(model: PreTrainedModel) -> float:
    config = model.config.get_text_config()
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
