"""Plausibility of the sizes in a model's configuration, given the weights beside it."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlens.core.errors import InputError, brief

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = (
    "vocab_size hidden_size n_embd d_model n_embed intermediate_size n_inner d_ff ffn_dim ffn_hidden_size head_dim "
    "num_attention_heads n_head num_key_value_heads num_experts num_local_experts n_routed_experts moe_intermediate_size"
).split()
PACKED = 16  # weights per stored number at most, where they are quantized
HEADER = 100 * 2**20  # bytes of a header at most, as in safetensors itself


def check_sizes(folder: Path) -> int | None:
    """Count the numbers in a folder's safetensors files, and check that config.json asks for no more.

    None where there are no such files or they are unreadable, which loading them reports.

    Raises:
        InputError: more layers than there are tensors, or an extent that is larger than all tensors together.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = [shape for file in sorted(folder.glob("*.safetensors")) for shape in _shapes(file)]
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):  # no valid header
        return None
    if not stored or not isinstance(config, dict):
        return None
    numbers = sum(stored) * (PACKED if "quantization_config" in config else 1)
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for names, limit, unit in ((LAYERS, len(stored), "tensors"), (WIDTHS, numbers, "numbers")):
            for name in names:
                value = part.get(name)
                if isinstance(value, int) and value < 1:
                    raise InputError(f"model folder {brief(str(folder))}: config.json has {name} = {brief(value)}")
                if isinstance(value, int) and value > limit:
                    raise InputError(
                        f"model folder {brief(str(folder))}: config.json asks for {name} = {brief(value)}, but its "
                        f"weights have {limit} {unit}: the configuration is of another model, or damaged"
                    )
    return numbers


def check_parameters(folder: Path, configured: int, stored: int) -> None:
    """Check that a model has about as many parameters as are stored (tied ones count twice).

    Raises:
        InputError: it has more than twice as many.
    """
    if configured > 2 * stored:
        raise InputError(
            f"model folder {brief(str(folder))}: config.json asks for {configured} parameters, but its weights hold {stored}: "
            "the configuration is of another model, or damaged"
        )


def _shapes(file: Path) -> list[int]:
    """The number of entries of each tensor of a safetensors file."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: Any = json.loads(stream.read(size)) if size <= HEADER else {}
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    return [functools.reduce(lambda a, b: a * b, shape, 1) for shape in shapes]
