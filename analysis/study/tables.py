"""Tables of a study as text, Markdown, LaTeX and HTML, with their notes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd

from qlens.analysis.table_formats import markdown_table, text_table
from qlens.core.display import frame_html, latex_table
from qlens.core.errors import one_line

DIFFERENCES = ["setting", "method", "against", "mean", "low", "high", "seeds", "items", "n", "p", "p_holm"]
AUROC = ["setting", "method", "trust", "Q", "trust_end", "Q_end", "p_end", "trust_all", "good", "noisy"]
MEASURED = {
    "prior knowledge": {
        "base": "accuracy of the base model",
        "base_right": "on the problems of the demonstrations",
        "base_agrees": "same answer as the demonstration",
    },
    "label noise": {
        "noise_asked": "requested share of demonstrations with an error",
        "noise": "measured share",
        "wrong_answers": "share with a wrong answer",
        "wrong_digits": "share of wrong digits",
    },
    "ambiguity": {"wordings": "effective number of wordings per phrase"},
    "teacher": {"teacher": "accuracy of the teacher", "kl_base_teacher": "KL(base || teacher) per token, nats"},
}
"""Measurements of a lab environment by subject."""
FEW_SEEDS = 10  # below this, corrected p-values can be too small: see the simulations in stats.holm
ORIGINS = {
    "as sft": "sft's learning rate, not searched (--lr-grid searches)",
    "default": "the default learning rate, not searched",
    "record of other steps": "the learning rate recorded for the setting's own number of steps",
}
AUROC_NOTE = (
    "AUROC of each score, correct labels against noisy ones: 1 separates them, 0.5 is chance. trust: the label's coefficient "
    "in the target; Q(label), p(label): its probability under target and model; start, end: before and after training"
)


def setting_cells(study: Any, setting: str) -> pd.DataFrame:
    """The results of one setting, formatted."""
    table = study.table()
    table = table[table["setting"] == setting]
    differences = study.differences()
    paired = differences[differences["setting"] == setting].set_index("method")
    cells = pd.DataFrame({"method": table["method"]})
    cells[study.config["metric"]["name"]] = table["mean"].map("{:.3f}".format)
    cells["95 % interval"] = [_interval(low, high) for low, high in zip(table["low"], table["high"], strict=True)]
    if "pass_at_k" in table:
        cells[f"pass@{study.config['settings'][setting]['k']}"] = table["pass_at_k"].map("{:.3f}".format)
    if len(differences):
        reference = differences["against"].iloc[0]
        means = paired["mean"].map("{:+.3f}".format)
        cells[f"minus {reference}"] = [means.get(name, "-") for name in table["method"]]
        cells["p (Holm)"] = [_p(paired["p_holm"].get(name)) for name in table["method"]]
    if "rank" in table and not study.config["metric"]["note"]:  # a metric with a caveat gives no ranking
        cells["rank"] = [_rank(*row) for row in zip(table["rank"], table["best"], table["worst"], strict=True)]
    cells["learning rate"] = [_rate(row) for _, row in table.iterrows()]
    for name, head in (
        ("label_weight", "label weight"), ("negative_mass", "negative mass"), ("kl_start", "KL from start")
    ):  # fmt: skip
        cells[head] = table[name].map(lambda x: "-" if pd.isna(x) else f"{x:.3f}")
    return cells


def control_cells(study: Any, setting: str) -> pd.DataFrame:
    """target_sft against its controls in one setting, formatted."""
    table = study.control_differences()
    table = table[table["setting"] == setting]
    intervals = [_interval(low, high, "{:+.3f}") for low, high in zip(table["low"], table["high"], strict=True)]
    return pd.DataFrame(
        {
            "target_sft minus": table["against"],
            study.config["metric"]["name"]: table["mean"].map("{:+.3f}".format),
            "95 % interval": intervals,
            "p (Holm)": table["p_holm"].map(_p),
        }
    )


def auroc_cells(study: Any, setting: str) -> pd.DataFrame:
    """The AUROCs of one setting, formatted; empty where no label is noisy."""
    table = study.label_auroc()
    table = table[(table["setting"] == setting) & (table["noisy"] > 0)]
    heads = {"method": "method", "trust": "trust, start", "Q": "Q(label), start", "trust_end": "trust, end"}
    heads |= {"Q_end": "Q(label), end", "p_end": "p(label), end", "trust_all": "trust, start, all tokens"}
    cells = table[list(heads)].rename(columns=heads)
    return cells.map(lambda x: x if isinstance(x, str) else "-" if pd.isna(x) else f"{x:.3f}")


def notes(study: Any, setting: str) -> list[str]:
    """Notes on the table of one setting, one line each."""
    metadata, config = study.config.get("noted", {}), study.config["settings"][setting]
    table = study.table()
    table = table[table["setting"] == setting]
    usual = table["n"].mode().iloc[0]
    lines = [f"n = {usual} (seeds x items), {config['steps']} steps of {config['batch_size']}"]
    lines += [f"{subject}: {words}" for subject, words in measurements(metadata.get("settings", {}).get(setting, {}))]
    if tests := int(study.differences()["p"].notna().sum()):
        few = f"; with fewer than {FEW_SEEDS} seeds it can be too small, see results/coverage.md"
        lines.append(f"p (Holm): over {tests} tests" + few * (int(usual.split()[0]) < FEW_SEEDS))
    if at_edge := list(table.loc[table["at_edge"].astype(bool), "method"]):
        lines.append(f"* {', '.join(at_edge)}: best at the edge of the learning-rate grid; a better one may lie beyond")
    for origin, words in ORIGINS.items():
        if methods := [name for name in table.loc[table["origin"] == origin, "method"]]:
            lines.append(f"{', '.join(methods)}: {words}")
    chosen = table[table["method"].map(lambda name: study.rates.query("method == @name")["recipe"].nunique() > 1)]
    for _, row in chosen.iterrows():
        mine = (study.rates["setting"] == setting) & (study.rates["method"] == row["method"])
        recipes = study.rates[mine]["recipe"]
        at_end = ", at the end of the choices" * (row["recipe"] in (recipes.iloc[0], recipes.iloc[-1]))
        lines.append(f"{row['method']}: {row['recipe']} was chosen on validation{at_end}")
    lines += [f"{row['method']}: n = {row['n']}" for _, row in table[table["n"] != usual].iterrows()]
    for note, rows in table[table["note"] != ""].groupby("note"):
        lines.append(f"{', '.join(rows['method'])}: {note}")
    lines += [f"failed: {line}" for line in metadata.get("failed", []) if f" in {setting} at seed " in line]
    return [*lines, *filter(None, [study.config["metric"]["note"]])]


def measurements(measured: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Subjects of ``MEASURED`` with what was measured of a setting; the rest under "measured"."""
    known = {name for words in MEASURED.values() for name in words}
    subjects = MEASURED | {"measured": {name: name.replace("_", " ") for name in measured if name not in known}}
    for subject, words in subjects.items():
        if parts := [f"{words[name]} {measured[name]}" for name in words if name in measured]:
            yield subject, "; ".join(parts)


def blocks(study: Any) -> Iterable[tuple[str, pd.DataFrame, list[str]]]:
    """All printed tables: heading, formatted cells, notes."""
    for setting in study.settings:
        if (study.results["setting"] == setting).any():
            yield f"{setting}: {study.label}", setting_cells(study, setting), notes(study, setting)
            if len(controls := control_cells(study, setting)):
                yield f"{setting}: target_sft against its controls, paired", controls, []
            if len(aurocs := auroc_cells(study, setting)):
                yield f"{setting}: label noise found by each method", aurocs, [AUROC_NOTE]


def text(study: Any) -> str:
    """The tables for a terminal."""
    return "\n\n".join(
        "\n".join([one_line(heading), text_table(cells), *(f"  {one_line(note)}" for note in lines)])
        for heading, cells, lines in blocks(study)
    )


def markdown(study: Any) -> str:
    """The tables in Markdown."""
    parts = []
    for heading, cells, lines in blocks(study):
        body = [f"## {_md(heading)}", "", markdown_table(cells.map(lambda cell: _md(str(cell))))]
        parts.append("\n".join([*body, *([""] if lines else []), *(f"- {_md(note)}" for note in lines)]))
    return "\n\n".join(parts) + "\n"


def latex(
    study: Any,
    columns: Sequence[str] | None = None,
    caption: str | None = None,
    label: str | None = None,
    **options: Any,
) -> str:
    """The tables in LaTeX (booktabs); ``columns`` of the settings' tables alone.

    Raises:
        InputError: a column that the tables do not have.
    """
    if columns is None:
        printed = [(heading, cells) for heading, cells, _ in blocks(study)]
    else:
        present = set(study.results["setting"])
        printed = [(name, setting_cells(study, name)) for name in study.settings if name in present]
    labels = [label and (label if number == 1 else f"{label}-{number}") for number in range(1, len(printed) + 1)]
    return "\n".join(
        f"% {one_line(heading)}\n{latex_table(cells, columns, caption, own, **options)}"
        for (heading, cells), own in zip(printed, labels, strict=True)
    )


def html(study: Any) -> str:
    """The settings' tables in HTML, for a notebook."""
    return "".join(
        frame_html(cells, heading) + f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
        for heading, cells, lines in blocks(study)
    )


def _interval(low: float, high: float, form: str = "{:.3f}") -> str:
    return "-" if pd.isna(low) else f"{form.format(low)} to {form.format(high)}"


def _p(p: float | None) -> str:
    return "-" if p is None or pd.isna(p) else "<.001" if p < 0.001 else f"{p:.3f}"


def _rank(rank: float, best: float, worst: float) -> str:
    if pd.isna(rank):
        return "-"
    return f"{rank:.0f}" if best == worst else f"{rank:.0f} ({best:.0f} to {worst:.0f})"


def _rate(row: pd.Series) -> str:
    return f"{row['learning_rate']:g}{'*' if row['at_edge'] else ''}" if row["learning_rate"] else "-"


def _md(text: str) -> str:
    """Text on one line without the beginning of a code span, a link or a tag."""
    return re.sub(r"[\\`\[\]]|<(?=[A-Za-z/!?])", r"\\\g<0>", one_line(text, most=10_000))
