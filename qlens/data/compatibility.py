"""Compatibility of models and tokenizers: vocabularies and context lengths."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.core.errors import InputError, brief


def vocabulary_size(model: PreTrainedModel) -> int:
    """The width of the model's logits."""
    return model.config.get_text_config().vocab_size


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence that a model takes, in tokens; None where its configuration names none.

    Raises:
        InputError: the configuration names a value that is not a length.
    """
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 2):
        raise InputError(
            f"the model's configuration has max_position_embeddings = {brief(length)}: it must be at least 2"
        )
    return length


def shortest_context(*models: PreTrainedModel | None) -> int | None:
    """The longest sequence that all models take (None is skipped); None where no configuration names one."""
    lengths = [context_length(model) for model in models if model is not None]
    return min((length for length in lengths if length is not None), default=None)


def check_model(model: Any, name: str) -> None:
    """Check that an argument is a loaded causal language model.

    Raises:
        InputError: it is not.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise InputError(
            f"{name} must be a loaded model, got {brief(model)}: load it by AutoModelForCausalLM.from_pretrained"
        )


def check_same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> None:
    """Check that two tokenizers have the same pieces at the same ids.

    Raises:
        InputError: they do not, with the first difference.
    """
    first, second = a.get_vocab(), b.get_vocab()
    if first == second:
        return
    differing = sorted(piece for piece in first.keys() | second.keys() if first.get(piece) != second.get(piece))
    piece = differing[0]
    raise InputError(
        f"the tokenizers have {len(first)} and {len(second)} pieces and differ in {len(differing)}: {piece!r} is "
        f"{first.get(piece, 'absent')} in one and {second.get(piece, 'absent')} in the other"
    )
