"""Where models come from: local folders or the hub, frozen teachers, and whether two of them fit together."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qlens.core.errors import InputError, brief
from qlens.core.files import user_path
from qlens.data.model_sizes import check_parameters, check_sizes

logger = logging.getLogger(__name__)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    wanted, place = _dtype(dtype), _device(device)
    folder = user_path(path, "model folder")
    if folder.is_dir() and (stored := check_sizes(folder)) is not None:
        config = _load(AutoConfig, path, "model")
        with _readable("model", path, local=True), quiet(), torch.device("meta"):  # without memory
            count = AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
        check_parameters(folder, count, stored)
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = _load(AutoModelForCausalLM, path, "model", dtype=wanted, **options)
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored_shape, shape = mismatched[0]
        raise InputError(
            f"model {brief(str(path))} does not fit its config.json: {name} is {tuple(stored_shape)}, but the configuration "
            f"asks for {tuple(shape)}"
        )
    if absent := sorted(report["missing_keys"]):
        raise InputError(f"model {brief(str(path))} lacks {len(absent)} weights, {absent[0]} among them")
    if unused := sorted(report["unexpected_keys"]):
        logger.warning("model %s: %d of its stored weights have no use, %s among them", path, len(unused), unused[0])
    try:
        return model.to(place).eval()
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
    folder, shown = user_path(path, f"{kind} folder"), f"{kind} folder {brief(str(path))}"
    local = folder.is_dir()
    if local and not any(found for pattern in NEEDED[kind] for found in folder.glob(pattern)):
        what = "is empty" if not any(folder.iterdir()) else f"has no {' or '.join(NEEDED[kind])}"
        raise InputError(f"{shown} {what}: it needs a Hugging Face {kind}")
    if not local and (isinstance(path, Path) or folder.exists() or _is_a_path(str(path), folder)):
        raise InputError(f"{shown} is not there, or is no folder (a name on the hub is owner/name)")
    with _readable(kind, path, local), quiet():
        place = str(folder) if local else str(path)
        return loader.from_pretrained(place, local_files_only=local, trust_remote_code=False, **options)


@contextmanager
def _readable(kind: str, path: str | Path, local: bool) -> Iterator[None]:
    """Whatever reading a model raises, as an InputError: tokenizers raises bare exceptions, safetensors its own, Rust panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        hint = "" if local else " (there is no such folder, so it was looked for on the hub)"
        raise InputError(f"{kind} {brief(str(path))} cannot be read{hint}: {_short(error)}") from error


def _is_a_path(given: str, folder: Path) -> bool:
    """Whether this is meant as a folder, not as a name on the hub, which is ``owner/name``."""
    beside = folder.parent.is_dir()  # of a bare name, that is here: a typo never goes out to the network
    return given.startswith((".", "~")) or Path(given).is_absolute() or len(Path(given).parts) != 2 or beside


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None:
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        raise InputError(f"dtype must be a floating-point type like 'float32' or 'bfloat16', got {brief(dtype)}")
    return found


def _device(device: str | torch.device) -> torch.device:
    """A device that numbers can be put on."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError, AttributeError) as error:
        raise InputError(f"device {brief(device)} cannot be used: {_short(error)}") from error
    if found.type == "meta":
        raise InputError("device 'meta' holds no numbers: name one that does, like 'cpu' or 'cuda'")
    return found


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars for reading and writing weights, which would tear our own apart, and without its warnings."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    hub_level = hub_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if shown:
            transformers_logging.enable_progress_bar()


def freeze(model: nn.Module) -> nn.Module:
    """The same model, in evaluation mode and without gradients."""
    return model.eval().requires_grad_(False)


def check_token_ids(model: nn.Module, features: Mapping[str, Any]) -> None:
    """Whether the token ids of a batch are rows of the model's input embedding.

    Raises:
        InputError: one is not.
    """
    ids, found = features.get("input_ids"), None
    with contextlib.suppress(AttributeError, NotImplementedError):  # not every model says where its embedding is
        found = model.get_input_embeddings()
    if isinstance(ids, Tensor) and ids.numel() and type(found) is nn.Embedding:
        for id in (int(ids.min()), int(ids.max())):
            if not 0 <= id < found.num_embeddings:
                raise InputError(f"input_ids hold {id}, outside the vocabulary 0..{found.num_embeddings - 1}")
