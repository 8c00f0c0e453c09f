"""Display: a target as text, HTML, table, LaTeX and plot."""

from typing import TYPE_CHECKING, Any

from qlens.core.display import Result, frame_html, number

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

SHOWN = 10  # rows of a target that HTML shows
COLUMNS = ("label", "p_y", "q_y", "trust", "scale", "label_weight", "reshape", "negative_mass", "entropy", "kl")


class Display(Result):
    """Tables and plots of a ``Target``."""

    def __repr__(self: Any) -> str:
        size, vocabulary = self.logits.shape
        inside = int(self.in_simplex.sum())
        return f"Target(N={size}, V={vocabulary}, label weight {_range(self.label_weight)}, {inside} of {size} distributions)"

    def _repr_html_(self: Any) -> str:
        more = f", first {SHOWN} rows" if len(self.labels) > SHOWN else ""
        return frame_html(self[:SHOWN].to_frame(), f"{self!r}{more}")

    def to_frame(self: Any) -> "pd.DataFrame":
        """The figures of every token as a frame.

        Columns: label, p_y, q_y, trust (the label's coefficient in the construction), scale, label_weight
        (-g_y / (1 - p_y)), reshape, negative_mass, entropy and kl (nats, NaN where Q is signed).

        Example:
            >>> import qlens
            >>> target = qlens.get("dft").target(qlens.probes())
            >>> list(target.to_frame())[:5]
            ['label', 'p_y', 'q_y', 'trust', 'scale']
        """
        import pandas as pd

        q_y = self.label_probs + self.pull / self.scale
        values = {"label": self.labels, "p_y": self.label_probs, "q_y": q_y}
        values |= {name: getattr(self, name) for name in COLUMNS[3:]}
        return pd.DataFrame({name: value.cpu().numpy() for name, value in values.items()})

    def plot(self: Any, *, ax: Any = None, name: str = "target", **line: Any) -> Any:
        """Plot the label weight of every token against p_y.

        Args:
            ax: matplotlib Axes; by default the current one.
            name: of the target in the legend.
            line: options of ``Axes.plot``.

        Returns:
            The Axes.
        """
        from qlens.analysis.plots import plot_label_weight

        frame = self.to_frame().dropna(subset="label_weight")
        return plot_label_weight(frame.assign(method=name)[["method", "p_y", "label_weight"]], ax=ax, **line)


def _range(values: "Tensor") -> str:
    """The range of some numbers, NaN left out."""
    finite = values[~values.isnan()]
    if not len(finite):
        return "undefined"
    low, high = number(float(finite.min())), number(float(finite.max()))
    return low if low == high else f"{low} to {high}"
