"""SmolLM2-135M-Instruct for tests marked ``real``: its local Hugging Face folder, or a skip with the reason."""

import os
from pathlib import Path

import pytest

VARIABLE = "QLENS_SMOLLM2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def smollm2() -> Path:
    """The model's folder: ``$QLENS_SMOLLM2``, else ``qlens-trial/smollm2-135m-instruct`` in the user's cache."""
    folder = Path(os.environ.get(VARIABLE) or CACHE / "qlens-trial" / "smollm2-135m-instruct")
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"SmolLM2-135M-Instruct is not at {folder}: set {VARIABLE} to its folder")
    return folder
