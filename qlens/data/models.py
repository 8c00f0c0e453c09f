"""Loading of models and tokenizers from Hugging Face folders or the hub."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qlens.core.errors import InputError, brief
from qlens.core.files import read_json, user_path
from qlens.core.numerics import dtype_name
from qlens.data.model_folders import place_of, quiet, readable, short_error
from qlens.data.model_sizes import check_parameters, check_sizes

logger = logging.getLogger(__name__)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
ADAPTERS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # files of a folder of adapters
SPARE = 0.8  # share of the free memory that weights in float32 may take


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> PreTrainedModel:
    """Load a causal language model from a Hugging Face folder or the hub, in evaluation mode.

    Weights are read from safetensors only, and code in the folder is never run. Of a folder of adapters (peft), the model is
    its base model with them merged.

    Args:
        path: the folder, or a name on the hub.
        device: where the model goes.
        dtype: such as "float32" or "bfloat16"; None: as saved.

    Returns:
        The model.

    Raises:
        InputError: no such folder, nothing readable in it, missing weights, or an unknown dtype or device.

    Example:
        >>> model = load_model("path/to/model", dtype="bfloat16")  # doctest: +SKIP
    """
    torch_dtype, place = _dtype(dtype), _device(device)
    folder = user_path(path, "model folder")
    if (folder / ADAPTERS).is_file() and not (folder / "config.json").is_file():
        return _merged(folder, path, device, dtype)
    if folder.is_dir() and (stored := check_sizes(folder)) is not None:
        config = _load(AutoConfig, path, "model")
        with readable("model", path, local=True), quiet(), torch.device("meta"):  # allocates nothing
            count = AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
        check_parameters(folder, count, stored)
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = _load(AutoModelForCausalLM, path, "model", dtype=torch_dtype, **options)
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored_shape, shape = mismatched[0]
        raise InputError(
            f"model {brief(str(path))} does not fit its config.json: {name} is {tuple(stored_shape)}, but the "
            f"configuration asks for {tuple(shape)}"
        )
    if absent := sorted(report["missing_keys"]):
        raise InputError(f"model {brief(str(path))} lacks {len(absent)} weights, {absent[0]} among them")
    if unused := sorted(report["unexpected_keys"]):
        logger.warning("model %s: %d of its stored weights have no use, %s among them", path, len(unused), unused[0])
    try:
        return model.to(place).eval()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {short_error(error)}") from None


def _merged(
    folder: Path, path: str | Path, device: str | torch.device, dtype: str | torch.dtype | None
) -> PreTrainedModel:
    """The base model that a folder of adapters names, with the adapters merged."""
    from peft import PeftModel

    base = read_json(folder / ADAPTERS).get("base_model_name_or_path")
    if not base or not (folder / ADAPTER_WEIGHTS).is_file():
        problem = f"have no {ADAPTER_WEIGHTS}" if base else f"do not name their base model in {ADAPTERS}"
        raise InputError(f"the adapters in model folder {brief(str(path))} {problem}")
    try:
        model = load_model(base, device, dtype)
    except InputError as error:
        raise InputError(
            f"model folder {brief(str(path))} holds adapters of a model that is not read: {error}"
        ) from error
    with readable("adapters", path, local=True), quiet():
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval()  # type: ignore[operator]


def load_to_read(
    path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> PreTrainedModel:
    """Load a model whose predictions are read, not trained: on a CPU, weights saved in half precision become float32.

    CPUs without instructions for half precision are several times slower in it, and its logits have three digits on every CPU.
    The weights stay as saved where float32 does not fit the free memory. What is done is logged.

    Args:
        path, device: as for ``load_model``.
        dtype: None: float32 on a CPU, elsewhere as saved. A dtype that is named is the model's.

    Returns:
        The model.

    Raises:
        InputError: as ``load_model``.

    Example:
        >>> load_to_read("path/to/model").dtype  # doctest: +SKIP
        torch.float32
    """
    model = load_model(path, device, dtype)
    if dtype is not None or model.device.type != "cpu" or model.dtype not in HALF:
        return model
    saved, more, free = dtype_name(model.dtype), 2 * model.num_parameters(), psutil.virtual_memory().available
    if more > SPARE * free:
        logger.warning(
            "model %s is read in %s, as saved: float32 takes %.1f GiB more, and %.1f GiB are free",
            path, saved, more / 2**30, free / 2**30,
        )  # fmt: skip
        return model
    logger.warning(
        "model %s is saved in %s and read in float32 on the CPU; dtype=%r, on the command line --dtype %s, keeps it",
        path, saved, saved, saved,
    )  # fmt: skip
    return model.float()


def loaded(
    model: Any,
    name: str,
    device: str | torch.device = "cpu",
    load: Callable[[str | Path, str | torch.device], Any] = load_model,
) -> Any:
    """A model as it is, or loaded where ``model`` is a path.

    Args:
        model: a module, a folder or a name on the hub; None stays None.
        name: of the argument, for messages.
        device: where a loaded model goes; a module stays where it is.
        load: ``load_model``, or ``load_to_read`` for a model that is not trained.

    Raises:
        InputError: nothing can be loaded from the path.
    """
    if not isinstance(model, str | Path):
        return model
    try:
        return load(model, device)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def loaded_once(
    models: Mapping[str, Any],
    device: str | torch.device = "cpu",
    load: Callable[[str | Path, str | torch.device], Any] = load_model,
) -> dict[str, Any]:
    """Models by the names of their arguments, each path loaded once; None is left out.

    Args:
        models: modules, or paths, by name.
        device, load: as for ``loaded``.
    """
    opened: dict[str, Any] = {}
    result: dict[str, Any] = {}
    for name, model in models.items():
        if isinstance(model, str | Path):
            key = str(model)
            if key not in opened:
                opened[key] = loaded(model, name, device, load)
            model = opened[key]
        if model is not None:
            result[name] = model
    return result


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder or the hub; code in the folder is never run.

    Args:
        path: the folder, or a name on the hub.

    Returns:
        The tokenizer.

    Raises:
        InputError: no such folder, or no readable tokenizer in it.

    Example:
        >>> tokenizer = load_tokenizer("path/to/model")  # doctest: +SKIP
    """
    return _load(AutoTokenizer, path, "tokenizer")


def _load(loader: Any, path: str | Path, kind: str, **options: Any) -> Any:
    place, local = place_of(path, kind)
    with readable(kind, path, local), quiet():
        return loader.from_pretrained(place, local_files_only=local, trust_remote_code=False, **options)


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None:
        return "auto"
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if torch_dtype not in DTYPES:
        raise InputError(f"dtype must be a floating-point type like 'float32' or 'bfloat16', got {brief(dtype)}")
    return torch_dtype


def _device(device: str | torch.device) -> torch.device:
    """A device that can hold numbers."""
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError, AttributeError) as error:
        raise InputError(f"device {brief(device)} cannot be used: {short_error(error)}") from error
    if place.type == "meta":
        raise InputError("device 'meta' holds no numbers: name one that does, like 'cpu' or 'cuda'")
    return place


def freeze(model: nn.Module) -> nn.Module:
    """Switch a model to evaluation mode and its gradients off; returns the same model."""
    return model.eval().requires_grad_(False)


def placed(model: nn.Module, device: str | torch.device) -> nn.Module:
    """A model on a device; one that is quantised or dispatched to several devices stays where it is."""
    stays = getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None)
    return model if stays else model.to(device)


def moved(features: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A batch's inputs on the device of a model's first parameter."""
    place = next((value.device for value in model.parameters()), None)
    return {
        name: value.to(place) if place is not None and isinstance(value, Tensor) else value
        for name, value in features.items()
    }


def check_token_ids(model: nn.Module, features: Mapping[str, Any], name: str = "model") -> None:
    """Check that the token ids of a batch are within a model's input embedding.

    Raises:
        InputError: one is not.
    """
    ids, embedding = features.get("input_ids"), None
    with contextlib.suppress(AttributeError, NotImplementedError):  # not every model has the method
        embedding = model.get_input_embeddings()
    if isinstance(ids, Tensor) and ids.numel() and type(embedding) is nn.Embedding:
        for id in (int(ids.min()), int(ids.max())):
            if not 0 <= id < embedding.num_embeddings:
                whose = "" if name == "model" else f" of the {name}"
                raise InputError(
                    f"input_ids hold {id}, outside the vocabulary{whose} 0..{embedding.num_embeddings - 1}"
                )
