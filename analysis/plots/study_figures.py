"""Figures of a study: panels in a row per setting, or one panel for all settings."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from qlens.analysis.plots.comparison_axes import plot_calibration, plot_curves, plot_differences, plot_frontier
from qlens.analysis.plots.result_axes import plot_label_weight, plot_scores, plot_target
from qlens.analysis.plots.study_overview import figure_forest, figure_settings, method_keys
from qlens.analysis.plots.style import FAINT, head, legend_below, new_figure, of_figure
from qlens.core.deprecation import renamed_value

PANELS = {
    "settings": "results of all settings ({better} is better)",
    "scores": "result ({better} is better)",
    "differences": "paired differences",
    "frontier": "result against distance from the start",
    "curves": "learning curves, on {validated}",
    "calibration": "calibration of trust, at the start",
    "label_weight": "label weight, at the start",
    "target": "targets at one token, at the start",
}
"""Panels with their titles."""
OLD_PANELS = {"trust": "label_weight", "truth": "calibration"}
GLANCE = ("scores", "label_weight", "target")
WIDTHS = {"scores": 4.8, "differences": 4.8, "frontier": 5.2, "curves": 4.8, "calibration": 5.0}
WIDTHS |= {"label_weight": 4.2, "target": 5.6}
WHOLE = {"settings": figure_settings, "differences": figure_forest}
NAMED = ("scores", "differences", "calibration")  # panels that carry the names of the methods


def figure_study(study: Any, panels: Sequence[str] = GLANCE) -> Figure:
    """A study at a glance: scores, label weight against p_y, and the targets at one token; a row per setting.

    A single panel is repeated for all settings, up to three side by side; "settings" and "differences" are figures of
    their own.

    Args:
        study: of ``qlens.compare``.
        panels: names of ``PANELS``.
    """
    panels = [renamed_value("panel", panel, OLD_PANELS) for panel in panels]
    if len(panels) == 1 and panels[0] in WHOLE:
        return WHOLE[panels[0]](study)
    data = {panel: panel_data(study, panel) for panel in panels}
    settings = [name for name in study.settings if any((frame["setting"] == name).any() for frame in data.values())]
    single, methods = len(panels) == 1, study.methods
    places = [(setting, panel) for setting in settings for panel in panels]
    columns = min(len(settings), 2 + (len(settings) == 3)) if single else len(panels)
    rows = ceil(len(places) / columns)
    widths = [WIDTHS[panel] for panel in (list(panels) * columns if single else panels)]
    figure = new_figure(sum(widths), rows * (1.9 + 0.22 * len(methods)))
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": widths})
    for spare in grid.flat[len(places) :]:
        spare.set_visible(False)
    words = study.config["metric"] | {
        "validated": "held-out rows" if "data" in _first(study) else "validation problems"
    }
    for ax, (setting, panel) in zip(grid.flat, places, strict=False):
        _panel(study, of_figure(data[panel][data[panel]["setting"] == setting], methods), panel, ax)
        head(ax, f"{setting}: {PANELS[panel].format(**words)}")
    if not set(panels) <= set(NAMED):
        drawn = (
            methods if set(panels) & {"scores", "frontier", "curves"} else [name for name in methods if name != "base"]
        )
        _legend(figure, drawn, pale="target" in panels)
    return figure


def panel_data(study: Any, panel: str) -> pd.DataFrame:
    """The frame behind a panel, with a column ``setting``; empty without data."""
    panel = renamed_value("panel", panel, OLD_PANELS)
    if panel in ("settings", "scores", "frontier"):
        return study.table()
    if panel == "differences":
        return study.differences()
    if panel == "curves":
        return study.curve()
    if panel == "calibration":
        noisy = (
            study.label_auroc().query("noisy > 0")[["setting", "method", "trust"]].rename(columns={"trust": "auroc"})
        )
        return study.calibration.merge(noisy, on=["setting", "method"])
    return getattr(study, panel)


def _first(study: Any) -> dict[str, Any]:
    return next(iter(study.config["settings"].values()))


def _legend(figure: Figure, methods: Sequence[str], pale: bool) -> None:
    keys: list[Artist] = [*method_keys(methods)]
    legend_below(figure, keys + [Patch(color=FAINT, label="starting model, p")] * pale)


def _panel(study: Any, data: pd.DataFrame, panel: str, ax: Axes) -> None:
    label = study.config["metric"]["name"]
    if panel == "target":
        observed = next(iter(data.loc[data["label"].astype(bool), "token"]), None)
        plot_target(data, ax=ax, label=observed)
    elif panel in ("label_weight", "calibration"):
        {"label_weight": plot_label_weight, "calibration": plot_calibration}[panel](data, ax=ax)
    else:
        draw = {
            "scores": plot_scores,
            "differences": plot_differences,
            "frontier": plot_frontier,
            "curves": plot_curves,
        }
        draw[panel](data, ax=ax, label=label)
