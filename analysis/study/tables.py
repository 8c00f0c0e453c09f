"""The tables of a study as text: printed, in Markdown and in LaTeX; with the notes a reader needs."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from qlens.core.errors import one_line

DIFFERENCES = ["setting", "method", "against", "mean", "low", "high", "seeds", "items", "n", "p", "p_holm"]
TRUTHS = ["setting", "method", "trust", "Q", "trust_end", "Q_end", "p_end", "trust_all", "good", "noisy"]
MEASURED = {
    "known": {
        "base": "base right",
        "base_right": "base right on the demonstrations' problems",
        "base_agrees": "base answers as they do",
    },
    "noisy": {
        "noise_asked": "errors asked for",
        "noise": "demonstrations with an error",
        "wrong_answers": "with a wrong answer",
        "wrong_digits": "digits that are wrong",
    },
    "not unique": {"wordings": "wordings per choice"},
    "missing": {"teacher": "teacher right", "kl_base_teacher": "KL(base || teacher) per token"},
}
"""What is measured of a setting, and in which sense it makes the setting hard."""
FEW = 10  # seeds, below which corrected p-values can be too small: see the simulations in stats.holm
ORIGINS = {
    "as sft": "sft's rate, not searched (--lr-grid searches)",
    "default": "the default rate, not searched",
    "record of other steps": "the rate recorded for the setting's own number of steps",
}


def shown(study: Any, setting: str) -> pd.DataFrame:
    """The table of one setting as it is printed: text in every cell."""
    table = study.table()
    table = table[table["setting"] == setting]
    against = study.differences()
    paired = against[against["setting"] == setting].set_index("method")
    cells = pd.DataFrame({"method": table["method"]})
    cells[study.config["metric"]["name"]] = table["mean"].map("{:.3f}".format)
    cells["95 % interval"] = [_interval(low, high) for low, high in zip(table["low"], table["high"], strict=True)]
    if "pass_at_k" in table:
        cells[f"pass@{study.config['settings'][setting]['k']}"] = table["pass_at_k"].map("{:.3f}".format)
    if len(against):
        reference = against["against"].iloc[0]
        cells[f"minus {reference}"] = [_of(paired, name, "mean", "{:+.3f}") for name in table["method"]]
        cells["p (Holm)"] = [_p(paired["p_holm"].get(name)) for name in table["method"]]
    if "rank" in table and not study.config["metric"]["note"]:  # what is no ranking gets no ranks
        cells["rank"] = [_rank(*row) for row in zip(table["rank"], table["best"], table["worst"], strict=True)]
    cells["rate"] = [_rate(row) for _, row in table.iterrows()]
    for name, head in (("trust", "trust"), ("negative_mass", "off simplex"), ("kl_start", "KL from start")):
        cells[head] = table[name].map(lambda x: "-" if pd.isna(x) else f"{x:.3f}")
    return cells


def shown_controls(study: Any, setting: str) -> pd.DataFrame:
    """target_sft against its controls in one setting, as text."""
    found = study.controlled()
    found = found[found["setting"] == setting]
    return pd.DataFrame(
        {
            "target_sft minus": found["against"],
            study.config["metric"]["name"]: found["mean"].map("{:+.3f}".format),
            "95 % interval": [
                _interval(low, high, "{:+.3f}") for low, high in zip(found["low"], found["high"], strict=True)
            ],
            "p (Holm)": found["p_holm"].map(_p),
        }
    )


def shown_truths(study: Any, setting: str) -> pd.DataFrame:
    """The AUROCs of one setting, as text; empty where no label is noisy."""
    found = study.truths()
    found = found[(found["setting"] == setting) & (found["noisy"] > 0)]
    heads = {"method": "method", "trust": "trust, start", "Q": "Q(label), start", "trust_end": "trust, end"}
    heads |= {"Q_end": "Q(label), end", "p_end": "p(label), end", "trust_all": "trust, start, all words"}
    cells = found[list(heads)].rename(columns=heads)
    return cells.map(lambda x: x if isinstance(x, str) else "-" if pd.isna(x) else f"{x:.3f}")


def notes(study: Any, setting: str) -> list[str]:
    """What a reader of a setting's table should know, a line each."""
    noted, given = study.config.get("noted", {}), study.config["settings"][setting]
    measured = noted.get("settings", {}).get(setting, {})
    table = study.table()
    table = table[table["setting"] == setting]
    usual = table["n"].mode().iloc[0]
    said = [f"n = {usual} (seeds x items), {given['steps']} steps of {given['batch_size']}"]
    said += [f"{sense}: {told}" for sense, told in told_of(measured).items()]
    if tests := int(study.differences()["p"].notna().sum()):
        few = f"; with fewer than {FEW} seeds it can be too small, see results/coverage.md"
        said.append(f"p (Holm): over {tests} tests" + few * (int(usual.split()[0]) < FEW))
    if at_edge := list(table.loc[table["at_edge"].astype(bool), "method"]):
        said.append(f"* {', '.join(at_edge)}: best at the edge of the grid of rates; a better one may lie beyond")
    for origin, words in ORIGINS.items():
        if mine := [name for name in table.loc[table["origin"] == origin, "method"]]:
            said.append(f"{', '.join(mine)}: {words}")
    chosen = table[table["method"].map(lambda name: study.rates.query("method == @name")["recipe"].nunique() > 1)]
    for _, row in chosen.iterrows():
        among = study.rates[(study.rates["setting"] == setting) & (study.rates["method"] == row["method"])]["recipe"]
        at_end = ", at the end of what it was chosen from" * (row["recipe"] in (among.iloc[0], among.iloc[-1]))
        said.append(f"{row['method']}: {row['recipe']} was chosen on validation{at_end}")
    said += [f"{row['method']}: n = {row['n']}" for _, row in table[table["n"] != usual].iterrows()]
    for note, rows in table[table["note"] != ""].groupby("note"):
        said.append(f"{', '.join(rows['method'])}: {note}")
    said += [f"failed: {line}" for line in noted.get("failed", []) if f" in {setting} at seed " in line]
    return [*said, *filter(None, [study.config["metric"]["note"]])]


def told_of(measured: Mapping[str, Any]) -> dict[str, str]:
    """What was measured of a setting, in words, by sense; what has no sense of its own under "measured"."""
    senses = {
        sense: {words[name]: measured[name] for name in words if name in measured} for sense, words in MEASURED.items()
    }
    listed = {name for words in MEASURED.values() for name in words}
    senses["measured"] = {name.replace("_", " "): value for name, value in measured.items() if name not in listed}
    return {
        sense: "; ".join(f"{words} {value}" for words, value in found.items())
        for sense, found in senses.items()
        if found
    }


def blocks(study: Any) -> Iterable[tuple[str, pd.DataFrame, list[str]]]:
    """All that is printed: heading, cells, notes."""
    for setting in study.settings:
        if (study.results["setting"] == setting).any():
            yield f"{setting}: {study.label}", shown(study, setting), notes(study, setting)
            if len(controls := shown_controls(study, setting)):
                yield f"{setting}: target_sft against its controls, paired", controls, []
            if len(truths := shown_truths(study, setting)):
                note = "AUROC of each belief, good labels against noisy ones; 1 separates them, .5 knows nothing"
                yield f"{setting}: trust against truth", truths, [note]


def text(study: Any) -> str:
    """As it is printed."""
    return "\n\n".join(
        "\n".join([one_line(heading), *_columns(cells), *(f"  {one_line(note)}" for note in said)])
        for heading, cells, said in blocks(study)
    )


def markdown(study: Any) -> str:
    """In Markdown."""
    parts = []
    for heading, cells, said in blocks(study):
        lines = [f"## {_md(heading)}", "", _row(cells.columns), _row(["---"] * len(cells.columns))]
        lines += [_row(row) for row in cells.itertuples(index=False)]
        parts.append("\n".join([*lines, *([""] if said else []), *(f"- {_md(note)}" for note in said)]))
    return "\n\n".join(parts) + "\n"


def latex(study: Any) -> str:
    """In LaTeX (booktabs)."""
    parts = []
    for heading, cells, _ in blocks(study):
        parts.append(f"% {heading}\n" + cells.map(_tex).rename(columns=_tex).to_latex(index=False, escape=False))
    return "\n".join(parts)


def _interval(low: float, high: float, form: str = "{:.3f}") -> str:
    return "-" if pd.isna(low) else f"{form.format(low)} to {form.format(high)}"


def _of(frame: pd.DataFrame, method: str, column: str, form: str) -> str:
    return form.format(frame.loc[method, column]) if method in frame.index else "-"


def _p(p: float | None) -> str:
    return "-" if p is None or pd.isna(p) else "<.001" if p < 0.001 else f"{p:.3f}"


def _rank(rank: float, best: float, worst: float) -> str:
    if pd.isna(rank):
        return "-"
    return f"{rank:.0f}" if best == worst else f"{rank:.0f} ({best:.0f} to {worst:.0f})"


def _rate(row: pd.Series) -> str:
    return f"{row['learning_rate']:g}{'*' if row['at_edge'] else ''}" if row["learning_rate"] else "-"


def _columns(frame: pd.DataFrame) -> list[str]:
    """Lines of text with the first column to the left and the rest to the right."""
    rows = [[one_line(cell) for cell in row] for row in (frame.columns, *frame.itertuples(index=False))]
    widths = [max(len(row[at]) for row in rows) for at in range(len(frame.columns))]
    padded = [[str.rjust(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_md(str(cell)).replace("|", r"\|") for cell in cells) + " |"


def _md(text: str) -> str:
    """Text that Markdown shows as it is: on one line, without the beginning of a code span, a link or a tag."""
    return re.sub(r"[\\`\[\]]|<(?=[A-Za-z/!?])", r"\\\g<0>", one_line(text, most=10_000))


TEX = {letter: "\\" + letter for letter in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
TEX |= {"<": "$<$", ">": "$>$"}


def _tex(text: str) -> str:
    return text.translate(str.maketrans(TEX))
