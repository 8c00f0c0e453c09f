"""Explain: what a loss teaches, token by token and in words."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch

from qlens import matching
from qlens.errors import InputError
from qlens.lens import gradient
from qlens.probes import probes, shapes
from qlens.registry import Variant, resolve
from qlens.target import Target, tolerance
from qlens.tokens import Tokens

COARSE = (torch.bfloat16, torch.float16)
TELLING = (0.001, 0.1, 0.5, 0.9, 0.999)  # the label probabilities shown first


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a loss teaches on some tokens: print it, or read ``table``, ``nearest``, ``findings`` and ``plot()``.

    Args:
        spec: the loss.
        tokens: where it was read.
        target: the implied target, unit scale.
        losses: the unreduced values in nats, (N,).
        nearest: registered methods, nearest first.
        pieces: turns a token id into its text; None on the probes.
    """

    spec: str
    tokens: Tokens
    target: Target
    losses: torch.Tensor
    nearest: list[matching.Match]
    pieces: Callable[[int], str] | None = None

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row per token: p_y, loss, trust, reshape, Q of the label and of its strongest rival, off-simplex mass, gradients."""
        t, y = self.target, self.tokens.labels[:, None].long()
        p = t.probs
        rival = p.scatter(1, y, -1).argmax(-1, keepdim=True)
        columns = {
            "p_y": p.gather(1, y)[:, 0],
            "p_rival": p.gather(1, rival)[:, 0],
            "loss": self.losses,
            "trust": t.effective_trust,
            "reshape": t.reshape,
            "q_label": t.q.gather(1, y)[:, 0],
            "q_rest": t.q.gather(1, rival)[:, 0],
            "negative_mass": t.negative_mass,
            "total": t.total,
            "label_grad": t.grad.gather(1, y)[:, 0],
            "other_grad": t.grad.gather(1, rival)[:, 0],
        }
        frame = pd.DataFrame({name: value.detach().double().cpu().numpy() for name, value in columns.items()})
        name = self.pieces or str
        frame.insert(0, "label", [name(int(i)) for i in y[:, 0]])
        frame.insert(1, "rival", [name(int(i)) for i in rival[:, 0]])
        frame.insert(2, "shape", shapes() if self.on_probes else "text")
        return frame

    @property
    def on_probes(self) -> bool:
        """Whether it was read on the built-in probes."""
        return self.pieces is None and len(self.tokens) == len(shapes())

    @cached_property
    def findings(self) -> list[str]:
        """What a reader should know, in words."""
        broken = int((~self.target.grad.isfinite().all(-1)).sum())
        if broken:
            return [f"WARNING: the gradient is not finite on {broken} of {len(self.table)} tokens."]
        if not bool(self.target.grad.any()):
            return ["WARNING: the gradient is zero on every token: Q = p, nothing is taught."]
        digits, coarse = carried(self.target.grad), []
        if digits in COARSE:
            coarse.append(f"Precision: the gradient holds {str(digits).removeprefix('torch.')} digits only.")
        undefined = int((~self.losses.isfinite()).sum())
        if undefined:
            coarse.append(f"WARNING: the loss is not finite on {undefined} of {len(self.table)} tokens.")
        return [*coarse, *_trust(self.table), *_rest(self.table), *_simplex(self.target, self.table)]

    @property
    def telling(self) -> pd.DataFrame:
        """The rows of ``table`` nearest to telling label probabilities."""
        frame = self.table[self.table["shape"] != "flat"]
        rows = [(frame["p_y"] - wanted).abs().idxmin() for wanted in TELLING]
        return frame.loc[list(dict.fromkeys(rows))]

    def plot(self) -> Any:
        """The figure: gradients, targets and trust against p_y (matplotlib)."""
        from qlens.analysis.plots import figure_explain

        return figure_explain(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything printable, for JSON."""
        return {
            "loss": self.spec,
            "tokens": len(self.tokens),
            "vocabulary": self.tokens.logits.shape[1],
            "findings": self.findings,
            "nearest": [vars(match) for match in self.nearest],
            "table": self.table.to_dict("records"),
        }

    def __str__(self) -> str:
        n, v = self.tokens.logits.shape
        where = "built-in probes" if self.on_probes else "tokens"
        dtype = str(self.target.q.dtype).removeprefix("torch.")
        shown = self.telling[["label", "p_y", "trust", "q_label", "rival", "p_rival", "q_rest", "negative_mass"]]
        shown = shown.rename(columns={"q_label": "Q(label)", "p_rival": "p(rival)", "q_rest": "Q(rival)"})
        shown = shown.rename(columns={"negative_mass": "off simplex"})
        if self.pieces is None:
            shown = shown.drop(columns=["label", "rival"])
        lines = [f"{self.spec}: the target it trains toward, Q = p - g ({n} {where}, V = {v}, {dtype})", ""]
        lines += [shown.to_string(index=False, float_format=lambda x: f"{x:.4f}"), ""]
        lines += self.findings
        if self.nearest:
            lines += ["Nearest methods:", *(f"  {match}" for match in self.nearest[:3])]
        return "\n".join(lines)


def explain(
    loss: Variant | str | Callable, tokens: Tokens | None = None, *, pieces: Callable[[int], str] | None = None
) -> Explanation:
    r"""What any loss teaches: its implied Q = p - g, its trust in the label, and the method it comes nearest to.

    Args:
        loss: a Variant, a spec, FILE.py:FUNCTION, or a callable (see ``implied_target``).
        tokens: where to read it; by default the built-in probes, on which p_y runs from 1e-6 to 1 - 1e-6.
        pieces: turns a token id into its text, for printing (a tokenizer's ``convert_ids_to_tokens``, say).

    Raises:
        InputError: the loss cannot be called, has no gradient, or there are no tokens; what it raised is named.

    Source: Xie et al. 2026 (arXiv 2606.11189).

    Example:
        >>> import torch.nn.functional as F
        >>> e = explain(lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1))
        >>> e.nearest[0].spec, e.nearest[0].relation
        ('label_smoothing', 'identical')
    """
    variant = resolve(loss)
    if tokens is None:
        try:
            read = _read(variant, probes(), pieces)
        except InputError as error:  # a loss with float32 inside may refuse float64
            if not isinstance(error.__cause__, RuntimeError):
                raise
            read = None
        if read is not None and carried(read.target.grad) == torch.float64:
            return read
        tokens = probes(torch.float32)
    if not len(tokens):
        raise InputError("tokens holds no rows: there is nothing to explain the loss on")
    return _read(variant, tokens, pieces)


def carried(grad: torch.Tensor) -> torch.dtype:
    """The least precise type that holds every digit of a gradient: what the loss computed in, whatever it returned."""
    narrower = (*COARSE, torch.float32)
    return next((dtype for dtype in narrower if bool((grad.to(dtype).to(grad.dtype) == grad).all())), grad.dtype)


def _read(variant: Variant, tokens: Tokens, pieces: Callable[[int], str] | None) -> Explanation:
    try:
        with torch.no_grad():
            losses = variant.loss(tokens)
        target = Target.from_grad(tokens, gradient(variant.loss, tokens))
    except InputError:
        raise
    except Exception as error:  # anything at all may go wrong inside a user's loss
        raise InputError(f"{variant.spec} raised {type(error).__name__}: {error}") from error
    finite = bool(target.grad.isfinite().all())
    near = matching.nearest(target.grad, tokens, skip=variant.spec) if finite else []
    return Explanation(variant.spec, tokens, target, losses, near, pieces)


def _trust(table: pd.DataFrame) -> list[str]:
    trust, p_y = table["trust"].dropna(), table["p_y"]
    if trust.empty:
        return ["Every p_y is 1 here: nothing is left to trust."]
    said = []
    low, high = trust.idxmin(), trust.idxmax()
    if trust[high] - trust[low] < 1e-6:
        said.append(f"Trust: the label is trusted by {trust[high]:.4g} on every token.")
    else:
        ends = [f"{trust[row]:.4g} (p_y = {p_y[row]:.6g})" for row in (low, high)]
        said.append(f"Trust: the label is trusted by {' to '.join(ends)}.")
    down = trust < -1e-6
    if down.any():
        rows = table.loc[trust[down].index]
        at, count = rows["p_y"], f"{int(down.sum())} of {len(table)} tokens"
        alarm = "WARNING: the" if (rows["q_label"] < 0).any() else "The"  # below p_y is a choice, below 0 hardly
        said.append(f"{alarm} label is pushed DOWN on {count} (p_y from {at.min():.6g} to {at.max():.6g}).")
    return said


def _rest(table: pd.DataFrame) -> list[str]:
    worst = table["reshape"].max()
    if worst < 1e-6:
        return ["Rest: what the label does not get follows the student's own distribution."]
    at = table.loc[table["reshape"].idxmax(), "p_y"]
    return [f"Rest: the alternatives are reshaped, by up to {worst:.3g} of the mass (p_y = {at:.3g})."]


def _simplex(target: Target, table: pd.DataFrame) -> list[str]:
    said, n = [], len(table)
    off = (table["total"] - 1).abs()
    coarse = carried(target.grad) in COARSE  # then sums are 1 to two digits only
    shifted = int(((target.total - 1).abs() > 0.05).sum() if coarse else (~target.shift_invariant).sum())
    if shifted:
        said.append(
            f"WARNING: sum(Q) is not 1 on {shifted} of {n} tokens (off by up to {off.max():.3g}): the loss sees raw logits, "
            "not only their softmax."
        )
    signed = table["negative_mass"] > tolerance(target.q)
    if signed.any():
        at = table["p_y"][signed]
        said.append(
            f"Simplex: Q has negative entries on {int(signed.sum())} of {n} tokens (p_y from {at.min():.3g} to {at.max():.3g}; "
            f"negative mass up to {table['negative_mass'].max():.3g})."
        )
    elif not shifted:
        said.append(f"Simplex: Q is a distribution on all {n} tokens.")
    return said
