"""Triton kernels of the structures "label" and mixture: one pass over a chunk's logits for statistics, one for the gradient.

They read the products of hidden states and head in their own dtype, add bias, scale and soft-cap, work in float32 and
write the gradient, slope of the cap included, in place of the products. ``kernels`` is the reference in plain torch.
Imported where a CUDA device and Triton are at hand (``uses_triton``).
"""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

from qlens.engine.kernels.raw_logits import RawLogits

LABEL, UNIFORM, MIXTURE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BLOCK, WARPS = 4096, 8  # entries of a row that a program works on at a time


@triton.jit
def _logits(z, bias, columns, inside, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr):
    x = tl.load(z + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    x *= scale
    if CAP:
        shrunk = tl.exp(-2 * tl.abs(x / cap))
        x = cap * tl.where(x < 0, -1.0, 1.0) * (1 - shrunk) / (1 + shrunk)  # cap tanh(x / cap)
    return tl.where(inside, x, -float("inf"))


@triton.jit
def _r_logits(x, y, inside, OWN: tl.constexpr, OTHER: tl.constexpr):
    r = tl.zeros_like(x)  # an exponent of 0 ignores even -inf
    if OTHER != 0:
        r += OTHER * y
    if OWN != 0:
        r += OWN * x
    return tl.where(inside, r, -float("inf"))


@triton.jit
def _finite(x):
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _statistics_kernel(
    z, bias, y, y_bias, labels, out, z_stride, y_stride, rows, scale, cap, y_scale, y_cap,
    V: tl.constexpr, KIND: tl.constexpr, WRITE: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, KL: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr, Y_BIAS: tl.constexpr, Y_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    y += row * y_stride
    label = tl.load(labels + row)
    at_label, top, total = 0.0, -float("inf"), 0.0
    r_at_label, r_top, r_total, expected = 0.0, -float("inf"), 0.0, 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        x = _logits(z, bias, columns, inside, scale, cap, BIAS, CAP)
        is_label = columns == label
        at_label += tl.sum(tl.where(is_label, x, 0.0), 0)
        rest = tl.where(is_label, -float("inf"), x)
        above = tl.maximum(top, tl.max(rest, 0))
        total = total * tl.exp(top - _finite(above)) + tl.sum(tl.exp(rest - _finite(above)), 0)
        top = above
        if KIND == UNIFORM:
            expected += tl.sum(tl.where(inside, x, 0.0), 0)
        if KIND == MIXTURE:
            r = _r_logits(x, _logits(y, y_bias, columns, inside, y_scale, y_cap, Y_BIAS, Y_CAP), inside, OWN, OTHER)
            r_at_label += tl.sum(tl.where(is_label, r, 0.0), 0)
            r_above = tl.maximum(r_top, tl.max(r, 0))
            kept = tl.exp(r_top - _finite(r_above))
            share = tl.exp(r - _finite(r_above))
            gap = -x
            if KL:
                gap += r
            r_total = r_total * kept + tl.sum(share, 0)
            expected = expected * kept + tl.sum(tl.where(share == 0, 0.0, share * gap), 0)  # 0 ignores infinities
            r_top = r_above
    log_rest = _finite(top) + tl.log(total)
    out += row
    tl.store(out, at_label)
    tl.store(out + rows, log_rest)
    if KIND == UNIFORM:
        tl.store(out + 2 * rows, expected / V)
    if KIND == MIXTURE:
        tl.store(out + 2 * rows, expected / r_total)
        tl.store(out + 3 * rows, r_at_label)
        tl.store(out + 4 * rows, _finite(r_top) + tl.log(r_total))
    if WRITE:
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < V
            x = _logits(z, bias, columns, inside, scale, cap, BIAS, CAP)
            g = tl.where(columns == label, -1.0, tl.exp(x - _finite(log_rest)))
            if CAP:
                g *= 1 - (x / cap) * (x / cap)
            tl.store(z + columns, g.to(z.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    z, bias, y, y_bias, labels, row_numbers, z_stride, y_stride, rows, scale, cap, y_scale, y_cap,
    V: tl.constexpr, KIND: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr, Y_BIAS: tl.constexpr, Y_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    y += row * y_stride
    row_numbers += row
    label = tl.load(labels + row)
    log_z, share, label_entry = tl.load(row_numbers), tl.load(row_numbers + rows), tl.load(row_numbers + 2 * rows)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    x = _logits(z, bias, columns, inside, scale, cap, BIAS, CAP)
    g = tl.exp(x - log_z)
    if KIND == MIXTURE:
        r = _r_logits(x, _logits(y, y_bias, columns, inside, y_scale, y_cap, Y_BIAS, Y_CAP), inside, OWN, OTHER)
        g -= share * tl.exp(r - tl.load(row_numbers + 3 * rows))
    else:
        g -= share / V
    g = tl.where(columns == label, label_entry, g)
    if CAP:
        g *= 1 - (x / cap) * (x / cap)
    tl.store(z + columns, g.to(z.dtype.element_ty), mask=inside)


def _model(prefix: str, logits: RawLogits) -> dict:
    """A model's arguments of a kernel."""
    bias, cap = logits.bias, logits.softcap
    return {
        prefix or "z": logits.values,
        f"{prefix}_bias".lstrip("_"): logits.values if bias is None else bias,
        f"{prefix or 'z'}_stride": logits.values.stride(0),
        f"{prefix}_scale".lstrip("_"): logits.logit_scale,
        f"{prefix}_cap".lstrip("_"): cap or 1.0,
        f"{prefix}_BIAS".upper().lstrip("_"): bias is not None,
        f"{prefix}_CAP".upper().lstrip("_"): cap is not None,
    }


def statistics(
    z: RawLogits,
    labels: Int[Tensor, " n"],
    *,
    kind: tl.constexpr = LABEL,
    write: bool = False,
    y: RawLogits | None = None,
    exponents: tuple[float, float] = (0.0, 0.0),
    kl: bool = False,
) -> Float[Tensor, "K n"]:
    """Statistics of a chunk's rows: the label's logit and log sum exp of all other logits; K = 2, 3 or 5.

    Of the kind ``UNIFORM`` also the mean logit; of the kind ``MIXTURE`` E_r[f], log r_y before normalisation and its log sum
    exp, for r of the student's and the other model's logits y with these exponents, and f = log r - z, or -z without ``kl``.

    Args:
        write: whether p without the label, renormalised, less d is left in place of the logits.
    """
    rows, vocabulary = z.values.shape
    out = torch.empty((2, 3, 5)[kind.value], rows, dtype=torch.float32, device=z.values.device)
    _statistics_kernel[(rows,)](  # pyright: ignore[reportIndexIssue]
        labels=labels, out=out, rows=rows, V=vocabulary, KIND=kind.value, WRITE=write, OWN=exponents[0],
        OTHER=exponents[1], KL=kl, BLOCK=BLOCK, num_warps=WARPS, **_model("", z), **_model("y", y or z),
    )  # fmt: skip
    return out


def gradient_(
    z: RawLogits,
    labels: Int[Tensor, " n"],
    row_numbers: Float[Tensor, "P n"],
    y: RawLogits | None = None,
    exponents: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Leave p - c r in place of the logits, r uniform or of the student's and the other model's logits y.

    Args:
        row_numbers: log sum exp of the logits; c; the entry at the label; and, with y, log sum exp of the logits of r.
    """
    rows, vocabulary = z.values.shape
    kind = UNIFORM if y is None else MIXTURE
    _gradient_kernel[(rows, triton.cdiv(vocabulary, BLOCK))](  # pyright: ignore[reportIndexIssue]
        labels=labels, row_numbers=row_numbers, rows=rows, V=vocabulary, KIND=kind.value, OWN=exponents[0],
        OTHER=exponents[1], BLOCK=BLOCK, num_warps=WARPS, **_model("", z), **_model("y", y or z),
    )  # fmt: skip
