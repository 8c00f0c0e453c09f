"""Whether models and tokenizers fit together: vocabularies, context lengths and head types."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.core.errors import InputError, brief


def vocabulary_size(model: PreTrainedModel) -> int:
    """The width of the model's logits."""
    return model.config.get_text_config().vocab_size


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence the model was made for, in tokens; None where its configuration names none.

    Raises:
        InputError: the configuration names one that is no length.
    """
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if found is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 2):
        raise InputError(
            f"the model's configuration has max_position_embeddings = {brief(found)}: it must be at least 2"
        )
    return found


def shortest_context(*models: PreTrainedModel | None) -> int | None:
    """The longest sequence that all the models (None apart) were made for; None where no configuration names one."""
    known = [context_length(model) for model in models if model is not None]
    return min((length for length in known if length is not None), default=None)


def check_model(model: Any, name: str) -> None:
    """Whether this is a loaded model, not, say, the path of one.

    Raises:
        InputError: it is none.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise InputError(
            f"{name} must be a loaded model, got {brief(model)}: load it by AutoModelForCausalLM.from_pretrained"
        )


def check_same_vocabulary(model: PreTrainedModel, other: PreTrainedModel, name: str) -> None:
    """Whether another model's logits have the width of the model's.

    Raises:
        InputError: they do not; both sizes are named. Or the other is no model but, say, the path of one.
    """
    check_model(other, name)
    mine, its = vocabulary_size(model), vocabulary_size(other)
    if mine != its:
        raise InputError(
            f"{name} has a vocabulary of {its}, but the model's has {mine}: they must share one tokenizer; where only the "
            f"padding differs, qlens.data.vocabularies.match_vocabulary({mine}, {name}, {name!r}, tokenizer, "
            "its_tokenizer) makes one"
        )


def check_same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> None:
    """Whether two tokenizers have the same pieces at the same ids.

    Raises:
        InputError: they do not; the first difference is named.
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
