"""Angles between the gradients of methods on some tokens, from some rows at a time."""

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import row_blocks
from qlens.core.progress import track
from qlens.core.tokens import Tokens
from qlens.lens.identify.matching import method_gradient
from qlens.registry import Variant

TOGETHER = 2**24  # gradient entries of all methods together that are compared at a time
NOTHING = 1e-9  # gradients below it count as zero


def inner_products(variants: list[Variant], tokens: Tokens, progress: bool) -> tuple[list[str], Float[Tensor, "M M"]]:
    """The specs of the variants with a gradient on these tokens, and the inner products of their gradients.

    Gradients are computed from some rows at a time, those of methods whose tokens depend on each other from all rows.
    """
    whole = {
        variant.spec: grad for variant in variants
        if variant.scope != "token" and (grad := method_gradient(variant, tokens)) is not None
    }  # fmt: skip
    alone = [v for v in variants if v.spec not in whole and method_gradient(v, tokens[:1]) is not None]
    specs = [v.spec for v in variants if v.spec in whole or v in alone]
    products, largest = torch.zeros(len(specs), len(specs), dtype=torch.float64), torch.zeros(len(specs))
    undefined: set[str] = set()  # methods whose gradient is not finite somewhere
    blocks = list(row_blocks(*tokens.logits.shape, max(1, TOGETHER // max(len(specs), 1))))
    for rows in track(blocks, len(blocks), f"comparing methods on {len(tokens)} tokens", progress):
        some = tokens[rows]
        grads = {spec: grad[rows] for spec, grad in whole.items()}
        grads |= {v.spec: grad for v in alone if (grad := method_gradient(v, some)) is not None}
        undefined |= set(specs) - set(grads)
        flat = torch.stack([grads.get(spec, torch.zeros_like(some.logits)).double().flatten() for spec in specs]).cpu()
        products += flat @ flat.T
        largest = largest.maximum(flat.abs().amax(1).float())
    apart = [i for i, spec in enumerate(specs) if spec not in undefined and float(largest[i]) > NOTHING]
    return [specs[i] for i in apart], products[apart][:, apart]


def angle_table(names: list[str], products: Float[Tensor, "M M"]) -> pd.DataFrame:
    """A row per pair of methods: angle and log-ratio of scale, from the inner products of their gradients."""
    size = products.diag().sqrt()
    angles = torch.rad2deg(torch.acos((products / size / size[:, None]).clamp(-1, 1)))
    ratios = (size[:, None] / size).log()
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    columns = {"left": [names[i] for i, _ in pairs], "right": [names[j] for _, j in pairs]}
    columns |= {
        key: [float(values[i, j]) for i, j in pairs] for key, values in (("angle", angles), ("log_ratio", ratios))
    }
    return pd.DataFrame(columns)
