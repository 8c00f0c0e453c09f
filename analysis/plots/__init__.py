"""All plots and figures: functions on one Axes (``plot_...``), and figures of several panels (``figure_...``).

A plot takes its data first, draws on ``ax`` (the current Axes by default) and returns it; it computes, shows and saves
nothing, and leaves its data as they are. The data come from ``readings``, ``Explanation.table``, ``Study`` and ``Watch.frame``;
``save_figure`` writes a figure with its data beside it. One colour and marker per method, everywhere (``styles``).
"""

from qlens.analysis.plots.comparison_axes import plot_curves, plot_differences, plot_frontier, plot_truth
from qlens.analysis.plots.flow_figure import figure_destination, plot_destination
from qlens.analysis.plots.method_map import plot_atlas, plot_plane
from qlens.analysis.plots.result_axes import plot_scores, plot_target, plot_trust
from qlens.analysis.plots.save import save_figure
from qlens.analysis.plots.study_figures import GLANCE, PANELS, figure_study, panel_data
from qlens.analysis.plots.study_overview import figure_forest, figure_settings, plot_settings
from qlens.analysis.plots.style import DOUBLE, SINGLE, SPARE, STYLES, Style, shown, styles
from qlens.analysis.plots.target_axes import plot_sequence, plot_sweep, plot_update
from qlens.analysis.plots.target_data import along, candidates, plane, sweep, swept
from qlens.analysis.plots.target_figures import (
    explain_data,
    figure_atlas,
    figure_explain,
    figure_plane,
    figure_sequence,
    figure_sweep,
    figure_token,
)
from qlens.analysis.plots.watch_axes import figure_watch, plot_course, plot_motion

__all__ = [
    "DOUBLE",
    "GLANCE",
    "PANELS",
    "SINGLE",
    "SPARE",
    "STYLES",
    "Style",
    "along",
    "candidates",
    "explain_data",
    "figure_atlas",
    "figure_destination",
    "figure_explain",
    "figure_forest",
    "figure_plane",
    "figure_sequence",
    "figure_settings",
    "figure_study",
    "figure_sweep",
    "figure_token",
    "figure_watch",
    "panel_data",
    "plane",
    "plot_atlas",
    "plot_course",
    "plot_curves",
    "plot_destination",
    "plot_differences",
    "plot_frontier",
    "plot_motion",
    "plot_plane",
    "plot_scores",
    "plot_sequence",
    "plot_settings",
    "plot_sweep",
    "plot_target",
    "plot_trust",
    "plot_truth",
    "plot_update",
    "save_figure",
    "shown",
    "styles",
    "sweep",
    "swept",
]
