"""Screen: an explanation as text, HTML, LaTeX and plain values."""

import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd
import torch

from qlens.core.deprecation.columns import old_columns
from qlens.core.display import frame_html, latex_table
from qlens.core.numerics import dtype_name
from qlens.core.probes import shapes
from qlens.lens.describe.findings import DECOMPOSITION, WEIGHT

SHORT = (
    "WARNING",
    "On your text",
    "Your text",
    DECOMPOSITION,
    WEIGHT,
)  # beginnings of the findings that are printed without ``full``
WIDTH = 100
COLUMNS = {
    "label": "label",
    "p_y": "p_y",
    "label_weight": "label weight",
    "q_label": "Q(label)",
    "runner_up": "runner-up",
    "p_runner_up": "p(runner-up)",
    "q_runner_up": "Q(runner-up)",
    "negative_mass": "negative mass",
}
LEGEND = "label weight: -g_y / (1 - p_y), 1 for cross-entropy; runner-up: the most probable token besides the label"
LATEX = {
    "p_y": "$p_y$",
    "label_weight": "label weight",
    "q_label": "$Q_y$",
    "p_runner_up": "$p$ (runner-up)",
    "q_runner_up": "$Q$ (runner-up)",
    "negative_mass": "negative mass",
}
FIGURES = (
    "p_y", "p_runner_up", "loss", "label_weight", "reshape", "q_label", "q_runner_up", "negative_mass", "total",
    "label_grad", "runner_up_grad",
)  # fmt: skip


def frame(e: Any) -> pd.DataFrame:
    """A row per token: the label, its runner-up, their probabilities in p and Q, the label weight and so on."""
    columns = {name: e.figures[name].double().numpy() for name in FIGURES}
    table = pd.DataFrame(columns)
    text = e.token_text or str
    table.insert(0, "label", [text(i) for i in e.tokens.labels.tolist()])
    table.insert(1, "runner_up", [text(i) for i in e.figures["runner_up"].tolist()])
    table.insert(2, "shape", shapes() if e.on_probes and len(table) == len(shapes()) else "text")
    return table


def text(e: Any, full: bool) -> str:
    """The explanation for reading: summary, table, warnings, decomposition and nearest methods."""
    lines = [f"{e.spec}: the target it trains toward, Q = p - g ({_where(e)})", "", *_wrapped(e.summary), ""]
    lines += [_shown(e).to_string(index=False, float_format=lambda x: f"{x:.4f}"), *_wrapped(LEGEND), ""]
    called = [f"Called with {e.called_as}."] if e.called_as else []
    fixed_point = [f"Fixed point: {getattr(e.destination, 'sentence', e.destination)}"] if full else []
    findings = [line for line in e.findings if full or line.startswith(SHORT)]
    for line in (*findings, *e.notes, *called, *fixed_point):
        lines += _wrapped(line, "    ")
    if e.nearest:
        lines += [
            "Nearest methods (angle between the gradients on all tokens):",
            *(f"  {match}" for match in e.nearest[:3]),
        ]
    return "\n".join(lines)


def html(e: Any) -> str:
    """The explanation for a notebook: summary, table and nearest methods."""
    table = frame_html(_shown(e), float_format="{:.4f}".format)
    nearest = "".join(f"<li>{escape(str(match))}</li>" for match in e.nearest[:3])
    warnings = "".join(f"<p><b>{escape(line)}</b></p>" for line in e.findings if line.startswith("WARNING"))
    head = f"<p><b>{escape(e.spec)}</b>: the target it trains toward, Q = p - g ({escape(_where(e))})</p>"
    summary, legend = f"<p>{escape(e.summary)}</p>", f"<p><small>{escape(LEGEND)}</small></p>"
    return f"{head}{summary}{table}{legend}{warnings}<p>Nearest methods:</p><ul>{nearest}</ul>"


def latex(
    e: Any, columns: Sequence[str] | None = None, caption: str | None = None, label: str | None = None, **options: Any
) -> str:
    """The representative rows as a LaTeX table, by default of the columns ``LATEX``, whose headings are formulas."""
    options = {"float_format": "%.4f"} | options
    if columns is not None:
        return latex_table(e.representative, columns, caption, label, **options)
    table = e.representative[list(LATEX)].set_axis(list(LATEX.values()), axis=1)
    return latex_table(table, None, caption, label, **{"escape": False} | options)


def plain(e: Any) -> dict[str, Any]:
    """The explanation as plain values, for JSON."""
    mixture, classes = e.mixture, e.class_weights
    weights = classes and {"weights": classes.weights, "equal": classes.equal, "divided": classes.divided}
    rows = e.table.assign(**{old: e.table[new] for old, new in old_columns(e.table).items()})
    return {
        "loss": e.spec,
        "tokens": len(e.tokens),
        "vocabulary": e.tokens.logits.shape[1],
        "summary": e.summary,
        "findings": e.findings,
        "called_as": e.called_as,
        "notes": list(e.notes),
        "nearest": [vars(match) for match in e.nearest],
        "mixture": mixture and mixture.to_dict(),
        "laws": {name: law and vars(law) for name, law in e.laws.items()},
        "scope": e.scope and vars(e.scope),
        "label_weights": weights,
        "class_weights": weights,
        "normalised": e.batch_factor and vars(e.batch_factor),
        "position_weights": e.position_weights and vars(e.position_weights),
        "gate": e.batch_gate and vars(e.batch_gate),
        "centred": e.batch_moments and vars(e.batch_moments),
        "two_terms": e.two_terms and vars(e.two_terms),
        "nearly": e.near_match and vars(e.near_match),
        "by_vocabulary": e.by_vocabulary and vars(e.by_vocabulary),
        "whole": e.whole_batch,
        "unused": list(e.unused_inputs),
        "precision": dtype_name(e.computes_in),
        "leak": e.shift_variance and {"cause": e.shift_variance.cause, "value": e.shift_variance.value},
        "destination": e.destination if isinstance(e.destination, str) else e.destination.to_dict(),
        "table": rows.to_dict("records"),
    }


def _where(e: Any) -> str:
    n, v = e.tokens.logits.shape
    return f"{n} {'built-in probes' if e.on_probes else 'tokens'}, V = {v}, {precision(e)}"


def precision(e: Any) -> str:
    """The dtype of the reading, of the given logits and of the loss, as far as they differ."""
    used, own = dtype_name(e.read_dtype), dtype_name(e.computes_in)
    same = e.logits_dtype in (None, e.read_dtype)
    words = used if same else f"read in {used}; logits {dtype_name(e.logits_dtype)}"
    coarse = torch.finfo(e.computes_in).eps > torch.finfo(e.read_dtype).eps
    return f"{words}; the loss computes in {own}" if coarse else words


def _shown(e: Any) -> pd.DataFrame:
    names = {old: new for old, new in COLUMNS.items() if e.token_text is not None or old not in ("label", "runner_up")}
    return e.representative[list(names)].rename(columns=names)


def _wrapped(line: str, indent: str = "") -> list[str]:
    return [textwrap.fill(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)]
