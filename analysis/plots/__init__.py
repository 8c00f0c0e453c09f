"""Plots: functions on one Axes (``plot_...``) and whole figures (``figure_...``).

A plot takes a frame first, draws on ``ax`` (by default the current Axes) and returns it; it saves nothing and leaves its data
unchanged. The frames come from ``target_data`` (``sweep_frame``, ``token_frame``, ``text_frame``, ``plane_frame``),
``Explanation.table``, ``Study`` and ``Watch.frame``. ``save_figure`` writes a figure as PNG, PDF or SVG with its data beside it.
Every method has one colour and marker in all figures (``styles``). One call per picture: ``qlens.plot_token``,
``qlens.plot_text`` and ``qlens.plot_plane`` (``variant_figures``).
"""

from qlens.analysis.plots.comparison_axes import plot_calibration, plot_curves, plot_differences, plot_frontier
from qlens.analysis.plots.flow_figure import figure_destination, plot_destination
from qlens.analysis.plots.method_map import plot_atlas, plot_plane
from qlens.analysis.plots.report_figures import figure_mixture, plot_label_probs, plot_mixture
from qlens.analysis.plots.result_axes import plot_label_weight, plot_scores, plot_target
from qlens.analysis.plots.save import save_figure
from qlens.analysis.plots.study_figures import GLANCE, PANELS, figure_study, panel_data
from qlens.analysis.plots.study_overview import figure_forest, figure_settings, plot_settings
from qlens.analysis.plots.style import DOUBLE, SINGLE, SPARE, STYLES, Style, shown, styles
from qlens.analysis.plots.target_axes import plot_sequence, plot_sweep, plot_update
from qlens.analysis.plots.target_data import plane_frame, sweep_frame, sweep_tokens, text_frame, token_frame
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
from qlens.core.deprecation import renamed_attributes

__all__ = [
    "DOUBLE",
    "GLANCE",
    "PANELS",
    "SINGLE",
    "SPARE",
    "STYLES",
    "Style",
    "explain_data",
    "figure_atlas",
    "figure_destination",
    "figure_explain",
    "figure_forest",
    "figure_mixture",
    "figure_plane",
    "figure_sequence",
    "figure_settings",
    "figure_study",
    "figure_sweep",
    "figure_token",
    "figure_watch",
    "panel_data",
    "plane_frame",
    "plot_atlas",
    "plot_calibration",
    "plot_course",
    "plot_curves",
    "plot_destination",
    "plot_differences",
    "plot_frontier",
    "plot_label_probs",
    "plot_label_weight",
    "plot_mixture",
    "plot_motion",
    "plot_plane",
    "plot_scores",
    "plot_sequence",
    "plot_settings",
    "plot_sweep",
    "plot_target",
    "plot_update",
    "save_figure",
    "shown",
    "styles",
    "sweep_frame",
    "sweep_tokens",
    "text_frame",
    "token_frame",
]

__getattr__ = renamed_attributes(
    __name__,
    {
        "along": "text_frame",
        "candidates": "token_frame",
        "plane": "plane_frame",
        "plot_trust": "plot_label_weight",
        "plot_truth": "plot_calibration",
        "sweep": "sweep_frame",
        "swept": "sweep_tokens",
    },
)
