"""Folders of models and tokenizers, and names on the hub: what is there, and reading it without raw errors and noise."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from qlens.core.errors import InputError, brief
from qlens.core.files import user_path

PATTERNS = {"model": ("config.json",), "tokenizer": ("tokenizer*", "vocab*", "*.model")}


def has_tokenizer(path: str | Path) -> bool:
    """Whether a folder holds a tokenizer; a name on the hub is taken to have one."""
    folder = user_path(path, "tokenizer folder")
    return not folder.is_dir() or any(file for pattern in PATTERNS["tokenizer"] for file in folder.glob(pattern))


def place_of(path: str | Path, kind: str) -> tuple[str, bool]:
    """Where a model or tokenizer is read from, and whether that is a folder; a name on the hub as it is.

    Args:
        path: a folder, or a name on the hub.
        kind: "model" or "tokenizer".

    Raises:
        InputError: a folder that is not there, or that holds nothing of the kind.
    """
    folder, description = user_path(path, f"{kind} folder"), f"{kind} folder {brief(str(path))}"
    local = folder.is_dir()
    if local and not any(file for pattern in PATTERNS[kind] for file in folder.glob(pattern)):
        problem = "is empty" if not any(folder.iterdir()) else f"has no {' or '.join(PATTERNS[kind])}"
        raise InputError(f"{description} {problem}: it needs a Hugging Face {kind}")
    if not local and (isinstance(path, Path) or folder.exists() or _is_a_path(str(path), folder)):
        raise InputError(f"{description} is not there, or is no folder (a name on the hub is owner/name)")
    return str(folder) if local else str(path), local


def _is_a_path(text: str, folder: Path) -> bool:
    """Whether a path is meant as a folder, not as a name on the hub, which is ``owner/name``."""
    parent_exists = folder.parent.is_dir()  # that of a bare name does: a typo is never looked up on the network
    return text.startswith((".", "~")) or Path(text).is_absolute() or len(Path(text).parts) != 2 or parent_exists


@contextmanager
def readable(kind: str, path: str | Path, local: bool) -> Iterator[None]:
    """Context that turns every error into an InputError: tokenizers raises bare exceptions, safetensors its own, Rust panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        hint = "" if local else " (there is no such folder, so it was looked for on the hub)"
        raise InputError(f"{kind} {brief(str(path))} cannot be read{hint}: {short_error(error)}") from error


def short_error(error: BaseException) -> str:
    """The type and the message of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Context without the progress bars and warnings of transformers, which would garble those of qlens."""
    progress_bar, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    hub_level = hub_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        with without_peft_warning():
            yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if progress_bar:
            transformers_logging.enable_progress_bar()


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """Context without the warning of a name that peft 0.21 reads and transformers 5.23 deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield
