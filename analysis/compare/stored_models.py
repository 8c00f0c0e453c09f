"""Models given as modules, saved once to the cache folder, from which every worker process loads them."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.core.errors import InputError, brief
from qlens.core.files import make_folder
from qlens.data.model_folders import quiet
from qlens.lab import cache


def stored(model: Any, name: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The folder of a model: a path as it is; a module is saved under a digest of its weights, config and tokenizer.

    Args:
        model: a path, or a transformers model.
        name: of the argument, for messages.
        tokenizer: of the model; needed for a module alone.

    Raises:
        InputError: neither a path nor a transformers model, or a module without a tokenizer.
    """
    if isinstance(model, str | Path):
        return str(model)
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"{name} must be a folder or a transformers model, got {brief(model)}")
    if tokenizer is None:
        raise InputError(
            f"{name} is a module, which does not know its tokenizer: give tokenizer=, or a folder as {name}="
        )
    folder = cache.root() / "models" / digest(model, tokenizer)
    if not folder.is_dir():
        make_folder(folder.parent, "cache folder (QLENS_CACHE)")
        save(model, tokenizer, folder)
    return str(folder)


def digest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of weights, config and vocabulary."""
    content = hashlib.sha256(model.config.to_json_string().encode())
    content.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    content.update(str(tokenizer.chat_template).encode())
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model with its tokenizer; the folder appears when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    for old in (folder, partial):  # of an interrupted job
        shutil.rmtree(old, ignore_errors=True)
    with quiet():
        model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
