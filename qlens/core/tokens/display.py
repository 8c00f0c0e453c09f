"""Display: tokens as text, HTML, table and plot."""

from typing import TYPE_CHECKING, Any

import torch

from qlens.core.display import Result, table_html
from qlens.core.numerics import dtype_name, expectation

if TYPE_CHECKING:
    import pandas as pd


class Display(Result):
    """Tables and plots of ``Tokens``."""

    def __repr__(self: Any) -> str:
        size, vocabulary = self.logits.shape
        others = "".join(f", {name}" for name in self.fields() if name not in ("logits", "labels"))
        return f"Tokens(N={size}, V={vocabulary}, {dtype_name(self.logits.dtype)}{others})"

    def _repr_html_(self: Any) -> str:
        fields = {name: f"{tuple(value.shape)} {dtype_name(value.dtype)}" for name, value in self.fields().items()}
        return table_html(repr(self), fields)

    def to_frame(self: Any) -> "pd.DataFrame":
        """A row per token.

        Columns: label, p_y, runner_up (the most probable token besides the label), p_runner_up and entropy (nats) of the
        student, p_y_teacher and so on of the other models, and the per-token fields; of ``negatives`` their number.

        Example:
            >>> import qlens
            >>> list(qlens.probes().to_frame())[:5]
            ['label', 'p_y', 'runner_up', 'p_runner_up', 'entropy']
        """
        import pandas as pd

        log_probs = self.log_probs.detach()
        probs, labels = log_probs.exp(), self.labels[:, None].long()
        p_runner_up, runner_up = probs.scatter(1, labels, -1.0).max(-1)
        values = {
            "label": self.labels,
            "p_y": probs.gather(1, labels)[:, 0],
            "runner_up": runner_up,
            "p_runner_up": p_runner_up.clamp(min=0.0),
            "entropy": -expectation(probs, log_probs),
        }
        for name, value in self.fields().items():
            if name in ("logits", "labels"):
                continue
            if name == "negatives":
                values[name] = value.sum(-1)
            elif value.ndim == 2:
                values[f"p_y_{name}"] = self.gather(self.log_probs_of(name)).exp()
            else:
                values[name] = value
        return pd.DataFrame({name: _numpy(value) for name, value in values.items()})

    def plot(self: Any, *, ax: Any = None, **line: Any) -> Any:
        """Plot the probability of every label under the student and the other models.

        Args:
            ax: matplotlib Axes; by default the current one.
            line: options of ``Axes.plot``.

        Returns:
            The Axes.
        """
        from qlens.analysis.plots import plot_label_probs

        return plot_label_probs(self.to_frame(), ax=ax, **line)


def _numpy(value: torch.Tensor) -> Any:
    """A tensor as an array, bfloat16 as float32."""
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
