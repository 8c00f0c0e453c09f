"""Vocabularies of different padding over one tokenizer."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.core.deprecation import renamed_arguments
from qlens.core.errors import InputError
from qlens.data.compatibility import check_same_tokenizer, vocabulary_size

PADDING = -100.0  # the logit of a padding entry


@renamed_arguments(others="other_tokenizer")
def match_vocabulary(
    width: int,
    other: PreTrainedModel,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    other_tokenizer: PreTrainedTokenizerBase,
) -> str:
    r"""Give another model's logits the width of the model's, where both share a tokenizer and only the padding differs.

    Vocabularies are padded beyond the tokenizer for speed (151,936 and 152,064 entries over Qwen's one tokenizer). Padding
    entries that only the other model has are cut off. Those that only the model has get the logit ``PADDING`` from the other:
    a probability that is 0 in float32, with a finite logarithm, so that reverse KL stays finite. There Q_k = 0, and the
    gradient p_k - Q_k lowers these entries, as it does under labels. The model itself is not changed.

    Args:
        width: of the model's logits.
        other: a causal language model; its head is replaced in place, by one that shares its weights where it is cut.
        name: of the other, for messages.
        tokenizer, other_tokenizer: the model's and the other's.

    Returns:
        A sentence about the change; "" where the widths are the same.

    Raises:
        InputError: the tokenizers differ, a token is beyond one of the vocabularies, or the other's head is not linear.
    """
    check_same_tokenizer(tokenizer, other_tokenizer)
    other_width = vocabulary_size(other)
    if width == other_width:
        return ""
    top = max(tokenizer.get_vocab().values())
    head: Any = other.get_output_embeddings()
    if top >= min(width, other_width) or type(head) is not nn.Linear:
        problem = f"its tokenizer has a token {top}" if top >= min(width, other_width) else "its head is not linear"
        raise InputError(
            f"{name} has a vocabulary of {other_width}, the model of {width}, and {problem}: they cannot be matched"
        )
    with torch.no_grad():
        cut = other_width > width
        other.set_output_embeddings(_cut(head, width) if cut else _padded(head, width, _logit_scale(other)))
    other.config.get_text_config().vocab_size = width
    done = f"cut to {width}" if cut else f"padded to {width} with entries of probability 0"
    return f"{name}: a vocabulary of {other_width} over the model's own tokenizer, {done}"


def _cut(head: nn.Linear, size: int) -> nn.Linear:
    """The first entries of a head, sharing its weights."""
    cut = nn.Linear(1, 1, bias=head.bias is not None, device="meta")
    cut.weight = nn.Parameter(head.weight[:size], requires_grad=False)
    if head.bias is not None:
        cut.bias = nn.Parameter(head.bias[:size], requires_grad=False)
    cut.in_features, cut.out_features = head.in_features, size
    return cut


def _padded(head: nn.Linear, size: int, scale: float) -> nn.Linear:
    """A head with added entries, whose logits are ``PADDING``."""
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
