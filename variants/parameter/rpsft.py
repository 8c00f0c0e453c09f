"""Rotation-preserving SFT: cross-entropy, and a penalty that holds each weight matrix's leading singular directions."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from qlens.core.errors import InputError
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Between, Weight

Rank = Annotated[int, Between(1)]
SKIPPED = ("vision", "cross", "multi_modal")  # the released code leaves matrices with these in their names free


@register(
    "rpsft",
    title="Rotation-preserving SFT",
    paper="Jin et al. 2026, arXiv 2605.10973",
    scope="parameters",
    structure="label",
    trusted="1",
    residual="student",
    simplex=True,
    limits="weight = 0 is sft; at token level it is sft always; k >= min(shape) pulls the whole matrix back (L2 to the start)",
    modes={
        "paper-normalised": {"normalize": True},
        "dataclass": {"weight": 0.0, "k": 4096},
        "full-fine-tune": {"half": True},
    },
    differences=(
        "The released docstring divides each term by the squared norm of its pretrained block; in the code that "
        "division "
        "is commented out (normalize=True brings it back).",
        "Released code keeps the singular vectors in float16 and, in full fine-tuning, casts the weights to "
        "float16 for "
        "the product (half=True).",
        "Released defaults differ: weight 1 and k 768 in script and README, 0 and 4096 in the dataclass.",
        "Whether the paper normalises the penalty is not confirmed.",
    ),
    code="jinhangzhan/RPSFT sft/src/training/trainer.py::QwenTrainer.compute_loss",
    cites=("rpsft2026",),
)
def rpsft(
    tokens: Tokens, *, weight: Weight = 1.0, k: Rank = 768, normalize: bool = False, half: bool = False
) -> Target:
    r"""Cross-entropy, plus a penalty on how far each weight matrix moves within its k leading singular directions.

    .. math:: L = -\log p_y + \lambda \sum_W \| U_k^\top W V_k - U_k^\top W_0 V_k \|_F^2, \qquad Q = d

    W_0 = U S V^T is the matrix before training; the sum runs over the model's two-dimensional parameters, head and
    embeddings among them, except those with vision, cross or multi_modal in their names. The penalty does not enter
    Q: it is ``variant.penalty(model)``. W_0 are the weights at ``variant.start(model)``, which QTrainer calls when a
    run begins and saves with every checkpoint, so that a resumed run keeps the first one's start; without that call,
    those at the first ``penalty`` of a model.

    Args:
        tokens: logits (N, V) and labels (N,).
        weight: lambda, the weight of the penalty.
        k: number of singular directions; from the smaller side of W on, the penalty is that of the whole matrix.
        normalize: divide each term by the squared norm of U_k^T W_0 V_k.
        half: compute with float16 singular vectors and weights.

    Returns:
        Q (N, V), the one-hot label, at scale 1. Losses (N,) are in nats, without the penalty.

    Source: Jin et al. 2026 (arXiv 2605.10973); released code for the penalty's form.

    Example:
        >>> import torch, qlens
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> variant = qlens.get("rpsft", k=1)
        >>> float(variant.penalty(layer).detach())
        0.0
    """
    return Target.mix(tokens, trust=1.0, residual="student")


@rpsft.loss
def rpsft_loss(tokens: Tokens, *, weight, k, normalize, half) -> Float[Tensor, " N"]:
    """-log p_y, without the penalty."""
    return F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")


@rpsft.penalty
def rpsft_penalty(model: nn.Module, *, weight, k, normalize, half) -> Tensor:
    """weight sum_W || U^T W V - U^T W_0 V ||^2, a scalar."""
    if (k, half) not in _STARTS.get(model, {}):
        rpsft_start(model, None, weight=weight, k=k, normalize=normalize, half=half)
    anchors, device = _STARTS[model][k, half], next(model.parameters()).device
    matrices = [(name, matrix) for name, matrix in _matrices(model).items() if matrix.requires_grad]
    terms = [anchors[name].distance(matrix, normalize).to(device) for name, matrix in matrices]
    return weight * torch.stack(terms).sum() if terms else torch.zeros((), device=device)


@rpsft.start
def rpsft_start(
    model: nn.Module, saved: Mapping[str, Tensor] | None, *, weight, k, normalize, half
) -> dict[str, Tensor]:
    """Set W_0 to the present weights of the model, or to those of a checkpoint."""
    matrices = _matrices(model)
    if saved is None:
        anchors = {name: Anchor.of(matrix, k, half) for name, matrix in matrices.items()}
    else:
        anchors = {name: Anchor.read(saved, name, matrix, k, half) for name, matrix in matrices.items()}
    _STARTS.setdefault(model, {})[k, half] = anchors
    return {f"{name}.{part}": value for name, anchor in anchors.items() for part, value in anchor.parts().items()}


@dataclass(frozen=True, eq=False)
class Anchor:
    """The start of a matrix: its leading singular vectors and their block, or all of it where they span it."""

    left: Tensor | None
    right: Tensor | None
    block: Tensor

    @classmethod
    def of(cls, matrix: Tensor, k: int, half: bool) -> "Anchor":
        """The anchor of a matrix at its present values."""
        start = matrix.detach().clone()
        if k >= min(matrix.shape):
            return cls(None, None, start)
        u, _, vh = torch.linalg.svd(start.double(), full_matrices=False)
        dtype = torch.float16 if half else start.dtype
        left, right = u[:, :k].to(dtype), vh[:k].T.to(dtype)
        return cls(left, right, left.T @ start.to(dtype) @ right)  # diag(S), rounded as what it is compared with

    def parts(self) -> dict[str, Tensor]:
        """The tensors of the anchor by name, for a checkpoint."""
        tensors = {"left": self.left, "right": self.right, "block": self.block}
        return {name: value.contiguous() for name, value in tensors.items() if value is not None}

    @classmethod
    def read(cls, saved: Mapping[str, Tensor], name: str, matrix: Tensor, k: int, half: bool) -> "Anchor":
        """The anchor of a matrix from a checkpoint.

        Raises:
            InputError: the checkpoint has no anchor for this matrix, k and half.
        """
        parts = {part: saved.get(f"{name}.{part}") for part in ("left", "right", "block")}
        rows, columns = matrix.shape
        expected: dict[str, tuple | None] = {"left": (rows, k), "right": (columns, k), "block": (k, k)}
        if k >= min(matrix.shape):
            expected = {"left": None, "right": None, "block": (rows, columns)}
        shapes = {part: None if value is None else tuple(value.shape) for part, value in parts.items()}
        left = parts["left"]
        if shapes != expected or (left is not None and half != (left.dtype == torch.float16)):
            raise InputError(
                f"the checkpoint holds no start of {name} for rpsft(k={k}, half={half}): resume with the model, k and "
                "half that it was saved with"
            )
        left, right, block = (None if value is None else value.to(matrix.device) for value in parts.values())
        assert block is not None
        return cls(left, right, block)

    def distance(self, matrix: Tensor, normalize: bool) -> Tensor:
        """The squared Frobenius norm of the change of the block."""
        if self.left is None or self.right is None:
            change = matrix - self.block.to(matrix)
        else:
            change = (self.left.T.to(matrix.device) @ matrix.to(self.left.dtype) @ self.right.to(matrix.device)).to(
                matrix.dtype
            )
            change = change - self.block.to(matrix)
        size = change.square().sum()
        return size / self.block.to(matrix).square().sum() if normalize else size


_STARTS: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, bool], dict[str, Anchor]]]" = weakref.WeakKeyDictionary()
"""The anchors of each model in training, by (k, half) and the name of the matrix."""


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """The penalised weight matrices by name."""
    if adapters := [name for name, _ in model.named_parameters() if "lora_" in name]:
        raise InputError(f"rpsft holds full weights, but the model has adapters ({adapters[0]}): train it without them")
    return {n: p for n, p in model.named_parameters() if p.ndim == 2 and not any(s in n for s in SKIPPED)}
