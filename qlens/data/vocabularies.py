"""Vocabularies of different padding over one tokenizer.

Vocabularies are padded beyond the tokenizer for speed: 151,936 and 152,064 entries over Qwen's one tokenizer.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.core.deprecation import renamed_arguments
from qlens.core.errors import InputError
from qlens.core.numerics import softmax
from qlens.data.compatibility import check_model, check_same_tokenizer, vocabulary_size
from qlens.data.model_folders import has_tokenizer
from qlens.data.models import load_tokenizer
from qlens.engine.heads import Head, fitted

logger = logging.getLogger(__name__)
SAMPLE = 64  # tokens on which the mass beyond the common entries is measured
PADDING = -100.0  # the logit of a padding entry
MOST_PADDING = 1024  # entries by which vocabularies over one tokenizer may differ where no tokenizer is at hand


class Vocabularies:
    """Fits other models' predictions to the vocabulary of the model, and logs once per model what is done.

    Entries that only the other model has are cut off, and the rest is renormalised; the mass that it had put there is logged.
    Entries that only the model has get probability 0 from the other, with a finite logarithm (110 nats below the largest
    logit), so that reverse KL stays finite: there Q_k = 0 for distillation, and the gradient lowers p_k, as labels do.
    """

    def __init__(self):
        self.logged: set[str] = set()

    def check(self, model: PreTrainedModel, other: Any, name: str, tokenizer: Any = None) -> None:
        """Check that two models share a tokenizer, as far as theirs are at hand.

        Args:
            model: the model.
            other: another one.
            name: of the other, for messages.
            tokenizer: of the model; by default the one in the folder that it was loaded from.

        Raises:
            InputError: the tokenizers differ, or have a token beyond one of the vocabularies; or no model is given.
        """
        check_model(other, name)
        own = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else _tokenizer_beside(model)
        theirs = _tokenizer_beside(other)
        if own is not None and theirs is not None:
            try:
                check_same_tokenizer(own, theirs)
            except InputError as error:
                raise InputError(f"{name} is over another vocabulary than the model: {error}") from error
        width, other_width = vocabulary_size(model), vocabulary_size(other)
        pieces = own or theirs
        if width != other_width and pieces is not None:
            top = max(pieces.get_vocab().values())
            if top >= min(width, other_width):
                raise InputError(
                    f"{name} has a vocabulary of {other_width}, the model of {width}, and their tokenizer has a token {top}: "
                    "they differ by more than padding"
                )
        elif abs(width - other_width) > MOST_PADDING:
            raise InputError(
                f"{name} has a vocabulary of {other_width}, the model of {width}: more than padding, and no tokenizer is at hand "
                "to say that both share it; save it beside the models by tokenizer.save_pretrained(FOLDER)"
            )

    def fitted(self, predictions: Any, vocabulary: int, name: str) -> Any:
        """Another model's logits, (N, W), or ``Head``, over the first ``vocabulary`` entries.

        Args:
            predictions: of the other model.
            vocabulary: V of the model.
            name: of the other model, for the log.
        """
        width = predictions.width if isinstance(predictions, Head) else predictions.shape[-1]
        if width == vocabulary:
            return predictions
        if name not in self.logged:
            self.logged.add(name)
            logger.warning("qlens: %s", _sentence(predictions, width, vocabulary, name))
        return predictions.fitted(vocabulary) if isinstance(predictions, Head) else fitted(predictions, vocabulary)


def _sentence(predictions: Tensor | Head, width: int, vocabulary: int, name: str) -> str:
    """What is done to predictions of another width, with the mass that is cut off."""
    both = f"{name} has a vocabulary of {width}, the model of {vocabulary}"
    if width < vocabulary:
        return f"{both}: the {vocabulary - width} entries that {name} lacks have probability 0 there"
    if isinstance(predictions, Head):
        predictions = replace(predictions, hidden=predictions.hidden[:SAMPLE]).logits(slice(None))
    mass = softmax(predictions[:SAMPLE])[:, vocabulary:].sum(-1)
    return (
        f"{both}: cut to the common {vocabulary} and renormalised; the mass that is dropped with the others is "
        f"{float(mass.mean()):.2g} on average and {float(mass.max()):.2g} at most ({len(mass)} tokens)"
    )


def _tokenizer_beside(model: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder that a model was loaded from; None where there is no such folder."""
    folder = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(folder, str) or not folder or not Path(folder).is_dir() or not has_tokenizer(folder):
        return None
    return load_tokenizer(folder)


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
