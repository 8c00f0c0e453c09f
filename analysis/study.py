"""Study: what a comparison found, as tables, text, figures and files."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from qlens.analysis.stats import crossed_interval
from qlens.errors import InputError

FILES = {
    "results": "results.csv",
    "diagnostics": "diagnostics.csv",
    "trust": "figures/trust.csv",
    "target": "figures/target.csv",
}
HEADERS = {
    "method": "method",
    "mean": "{metric}",
    "interval": "95 % interval",
    "n": "n",
    "trust": "trust",
    "negative_mass": "off simplex",
    "kl_start": "KL from start",
}


@dataclass(frozen=True, eq=False)
class Study:
    """Methods trained side by side: print it, or use ``table()``, ``plot()``, ``save(dir)`` and the frames it came from.

    Args:
        config: what was run, and under "noted" how the settings measured and with which versions.
        results: setting, method, seed, item, score; one row each.
        diagnostics: setting, method, seed, and means over held-out tokens of the trained model (nats): nll, entropy,
            kl_start = KL(start || trained), trust, negative_mass; steps, seconds.
        trust: setting, method, p_y, trust: effective trust on the starting model's held-out tokens.
        target: setting, method, token, label, p, q: targets at one held-out token of the starting model.
    """

    config: dict[str, Any]
    results: pd.DataFrame
    diagnostics: pd.DataFrame
    trust: pd.DataFrame
    target: pd.DataFrame

    @classmethod
    def from_records(cls, config: dict[str, Any], records: Iterable[Mapping[str, Any]]) -> "Study":
        """A study from the jobs' records."""
        results, diagnostics, trust, target = [], [], [], []
        for record in records:
            key = {name: record[name] for name in ("setting", "method", "seed")}
            results.append(pd.DataFrame({**key, "item": range(len(record["scores"])), "score": record["scores"]}))
            diagnostics.append({**key, **record["diagnostics"]})
            if "reading" in record:
                place = {"setting": record["setting"], "method": record["method"]}
                trust.append(pd.DataFrame({**place, **record["reading"]["trust"]}))
                target.append(pd.DataFrame({**place, **record["reading"]["target"]}))
        read = {
            "trust": _stack(trust, ("setting", "method", "p_y", "trust")),
            "target": _stack(target, ("setting", "method", "token", "label", "p", "q")),
        }
        means = pd.DataFrame(diagnostics).astype({"trust": float, "negative_mass": float})
        order = cls._order(config)
        frames = {"results": pd.concat(results, ignore_index=True), "diagnostics": means, **read}
        return cls(config, **{name: order(frame) for name, frame in frames.items()})

    @staticmethod
    def _order(config: Mapping[str, Any]) -> Any:
        """Sorts a frame by setting, method and the rest, in the configuration's order."""
        ranks = {name: {each: rank for rank, each in enumerate(config[name + "s"])} for name in ("setting", "method")}

        def sort(frame: pd.DataFrame) -> pd.DataFrame:
            keys = [name for name in ("setting", "method", "seed", "item") if name in frame]
            return frame.sort_values(
                keys, kind="stable", ignore_index=True, key=lambda c: c.map(ranks[c.name]) if c.name in ranks else c
            )

        return sort

    @property
    def label(self) -> str:
        """What the scores are, and which way is up."""
        return f"{self.config['metric']['name']} ({self.config['metric']['better']} is better)"

    def table(self) -> pd.DataFrame:
        """A row per setting and method: mean score, 95 % interval over seeds x items, and the trained models' diagnostics.

        Columns: setting, method, mean, low, high, seeds, items, n, trust, negative_mass, kl_start, nll, note. For the
        interval see ``stats.crossed_interval``; diagnostics are means over seeds.
        """
        return self._table.copy()

    @cached_property
    def _table(self) -> pd.DataFrame:
        rows = []
        means = self.diagnostics.groupby(["setting", "method"])[["trust", "negative_mass", "kl_start", "nll"]].mean()
        for (setting, method), cells in self.results.groupby(["setting", "method"], sort=False):
            scores = cells.pivot(index="seed", columns="item", values="score")
            i = crossed_interval(scores.to_numpy())
            row = {"setting": setting, "method": method, "mean": i.mean, "low": i.low, "high": i.high}
            row |= {"seeds": i.seeds, "items": i.items, "n": i.n, **means.loc[(setting, method)], "note": i.note}
            rows.append(row)
        return pd.DataFrame(rows)

    def shown(self, setting: str) -> pd.DataFrame:
        """The table of one setting as it is printed: text in every cell."""
        table = self._table[self._table["setting"] == setting]
        cells = pd.DataFrame({"method": table["method"]})
        cells["mean"] = table["mean"].map("{:.3f}".format)
        cells["interval"] = [f"{low:.3f} to {high:.3f}" for low, high in zip(table["low"], table["high"], strict=True)]
        cells["n"] = table["n"]
        for name in ("trust", "negative_mass", "kl_start"):
            cells[name] = table[name].map(lambda x: "-" if pd.isna(x) else f"{x:.3f}")
        return cells.rename(columns={k: v.format(metric=self.config["metric"]["name"]) for k, v in HEADERS.items()})

    def notes(self, setting: str) -> list[str]:
        """What a reader of a setting's table should know, a line each."""
        measured = self.config.get("noted", {}).get("settings", {}).get(setting, {})
        told = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in measured.items())
        said = [f"measured: {told}"] if told else []
        given = self.config["settings"][setting]
        said.append(
            f"every method: {given['steps']} steps, batch {given['batch_size']}, learning rate {given['learning_rate']:g}"
        )
        noted = self._table[(self._table["setting"] == setting) & (self._table["note"] != "")]
        for note, rows in noted.groupby("note"):
            said.append(f"{', '.join(rows['method'])}: {note}")
        return [*said, *filter(None, [self.config["metric"]["note"]])]

    def __str__(self) -> str:
        blocks = []
        for setting in self.config["settings"]:
            lines = _columns(self.shown(setting))
            notes = [f"  {note}" for note in self.notes(setting)]
            blocks.append("\n".join([f"{setting}: {self.label}", *lines, *notes]))
        return "\n\n".join(blocks)

    def to_markdown(self) -> str:
        """The tables in Markdown."""
        blocks = []
        for setting in self.config["settings"]:
            shown = self.shown(setting)
            lines = [f"## {setting}: {self.label}", "", _row(shown.columns), _row(["---"] * len(shown.columns))]
            lines += [_row(row) for row in shown.itertuples(index=False)]
            blocks.append("\n".join([*lines, "", *(f"- {note}" for note in self.notes(setting))]))
        return "\n\n".join(blocks) + "\n"

    def to_latex(self) -> str:
        """The tables in LaTeX (booktabs)."""
        blocks = []
        for setting in self.config["settings"]:
            shown = self.shown(setting).map(_tex).rename(columns=_tex)
            blocks.append(f"% {setting}\n" + shown.to_latex(index=False, escape=False))
        return "\n".join(blocks)

    def plot(self) -> Any:
        """The figure: scores, trust against p_y and the targets at one token, a row per setting (matplotlib)."""
        from qlens.analysis.plots import figure_study

        return figure_study(self)

    def save(self, folder: str | Path) -> None:
        """Write the run folder: config.json, results.csv, diagnostics.csv, table.md, figures/ and report.html."""
        from qlens.analysis.report import save

        save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> "Study":
        """A study from its run folder.

        Raises:
            InputError: a file of it is missing.
        """
        folder = Path(folder)
        missing = [name for name in ("config.json", *FILES.values()) if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{folder} holds no finished study: {', '.join(missing)} missing")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = {"setting": str, "method": str, "token": str}
        read = {"dtype": text, "keep_default_na": False, "na_values": {"trust": [""], "negative_mass": [""]}}
        frames = {name: pd.read_csv(folder / file, **read) for name, file in FILES.items()}
        return cls(config, **frames)


def _stack(frames: list[pd.DataFrame], columns: Iterable[str]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(columns))


def _columns(frame: pd.DataFrame) -> list[str]:
    """Lines of text with the first column to the left and the rest to the right."""
    rows = [list(frame.columns), *frame.itertuples(index=False)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(frame.columns))]
    padded = [[str.rjust(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


TEX = {letter: "\\" + letter for letter in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}


def _tex(text: str) -> str:
    return text.translate(str.maketrans(TEX))
