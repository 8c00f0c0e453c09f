"""Where models come from: local folders or the hub, frozen teachers, and whether two of them fit together."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from qlens.errors import InputError


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> PreTrainedModel:
    """A causal language model from a Hugging Face folder (or hub name), in evaluation mode on ``device``.

    Weights are read from safetensors only and code in the folder is never run.

    Args:
        path: the folder, or a name on the hub.
        device: where the model goes.
        dtype: such as "float32" or "bfloat16"; as saved if not given.

    Raises:
        InputError: no such folder, nothing readable in it, weights missing from it, or an unknown dtype or device.
    """
    wanted = _dtype(dtype)
    model, report = _load(
        AutoModelForCausalLM, path, "model", use_safetensors=True, dtype=wanted, output_loading_info=True
    )
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise InputError(f"model {str(path)!r} lacks {len(absent)} weights, {absent[0]} among them")
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {_short(error)}") from None


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder (or hub name); code in the folder is never run.

    Raises:
        InputError: no such folder, or no readable tokenizer in it.
    """
    return _load(AutoTokenizer, path, "tokenizer")


NEEDED = {"model": ("config.json",), "tokenizer": ("tokenizer*", "vocab*", "*.model")}


def _load(loader: Any, path: str | Path, kind: str, **options: Any) -> Any:
    folder, shown = Path(path).expanduser(), f"{kind} folder {str(path)!r}"
    local = folder.is_dir()
    if local and not any(found for pattern in NEEDED[kind] for found in folder.glob(pattern)):
        what = "is empty" if not any(folder.iterdir()) else f"has no {' or '.join(NEEDED[kind])}"
        raise InputError(f"{shown} {what}: it needs a Hugging Face {kind}")
    if not local and (isinstance(path, Path) or folder.exists() or _is_a_path(str(path), folder)):
        raise InputError(f"{shown} is not there, or is no folder (a name on the hub is owner/name)")
    try:
        with quiet():
            return loader.from_pretrained(str(folder), local_files_only=local, trust_remote_code=False, **options)
    except Exception as error:  # tokenizers raises bare ones, safetensors its own: all mean unreadable
        hint = "" if local else " (there is no such folder, so it was looked for on the hub)"
        raise InputError(f"{kind} {str(path)!r} cannot be read{hint}: {_short(error)}") from None


def _is_a_path(given: str, folder: Path) -> bool:
    """Whether this is meant as a folder, not as a name on the hub, which is ``owner/name``."""
    beside = folder.parent.is_dir()  # of a bare name, that is here: a typo never goes out to the network
    return given.startswith((".", "~")) or folder.is_absolute() or len(folder.parts) != 2 or beside


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None:
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype must be a floating-point type like 'float32' or 'bfloat16', got {dtype!r}")
    return found


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars for reading and writing weights, which would tear our own apart."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def freeze(model: nn.Module) -> nn.Module:
    """The same model, in evaluation mode and without gradients."""
    return model.eval().requires_grad_(False)


@contextmanager
def evaluating(model: nn.Module):
    """The model in evaluation mode and without gradients for as long as the context lasts; then each part as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def model_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Another model's logits on a batch, (B, T, V), without gradient and without a key-value cache."""
    return model(**inputs, use_cache=False)["logits"]


def vocabulary_size(model: PreTrainedModel) -> int:
    """The width of the model's logits."""
    return model.config.get_text_config().vocab_size


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence the model was made for, in tokens; None where its configuration names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def shortest_context(*models: PreTrainedModel | None) -> int | None:
    """The longest sequence that all the models (None apart) were made for; None where no configuration names one."""
    known = [context_length(model) for model in models if model is not None]
    return min((length for length in known if length is not None), default=None)


def check_same_vocabulary(model: PreTrainedModel, other: PreTrainedModel, name: str) -> None:
    """Whether another model's logits have the width of the model's.

    Raises:
        InputError: they do not; both sizes are named. Or the other is no model but, say, the path of one.
    """
    if not isinstance(other, nn.Module):
        raise InputError(
            f"{name} must be a loaded model, got {other!r}: load it by AutoModelForCausalLM.from_pretrained"
        )
    mine, its = vocabulary_size(model), vocabulary_size(other)
    if mine != its:
        raise InputError(f"{name} has a vocabulary of {its}, but the model's has {mine}: they must share one tokenizer")


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
