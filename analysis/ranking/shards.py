"""Shards: the scores of finished rows as files, so that an interrupted ranking goes on where it stopped."""

import hashlib
import json
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import nn

from qlens.analysis.compare.run_folder import code, versions
from qlens.core.files import written
from qlens.lab.cache import root
from qlens.registry import Variant

Arrays = dict[str, np.ndarray]


def configuration(
    models: Mapping[str, nn.Module], examples: Sequence[Mapping[str, Any]], variants: Sequence[Variant], tokens: int
) -> dict[str, Any]:
    """Everything that the scores depend on, as digests: token ids and labels of all rows, models, methods, code."""
    rows = hashlib.sha256()
    for example in examples:
        rows.update(repr({name: np.asarray(example[name]).tolist() for name in sorted(example)}).encode())
    return {
        "rows": len(examples),
        "data": rows.hexdigest()[:16],
        "models": {name: _model_digest(model) for name, model in models.items()},
        "variants": [f"{variant.spec}, {_origin(variant)}" for variant in variants],
        "tokens_per_pass": tokens,
        "code": code(),
        "versions": versions(),
    }


def default_folder(config: Mapping[str, Any]) -> Path:
    """The folder of a configuration in the cache."""
    return root() / "rankings" / hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]


def _model_digest(model: nn.Module) -> str:
    """Of a model's class, configuration, weights and kind of device."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    config: Any = getattr(model, "config", None)
    if config is not None:
        values = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {value.device.type}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _origin(variant: Variant) -> str:
    """Where a method's code is; outside qlens with a digest of it."""
    module = sys.modules[variant.method.fn.__module__]
    if module.__name__.startswith("qlens."):
        return "built in"
    file = Path(str(getattr(module, "__file__", "")))
    from_file = module.__name__.startswith("qlens_user_")
    source = file.read_bytes() if from_file else cloudpickle.dumps(variant)
    return f"{file.name if from_file else 'code'} {hashlib.sha256(source).hexdigest()[:16]}"


class Shards:
    """The scores of finished rows in a folder, some rows per file.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, number: int) -> Arrays | None:
        """The arrays of a shard; None where it is not there or damaged."""
        try:
            with self._path(number).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, number: int, arrays: Arrays) -> None:
        """Write a shard atomically."""
        with written(self._path(number)) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)

    def _path(self, number: int) -> Path:
        return self.folder / f"rows-{number:05}.npz"
