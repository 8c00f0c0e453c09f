"""Study: what a comparison found, as frames; printed, drawn and saved from them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qlens.analysis.compare.recipes import BASE, CONTROLS
from qlens.analysis.compare.run_folder import read_config
from qlens.analysis.study import tables
from qlens.analysis.study.frames import check_results, frames, ordered, read_frame
from qlens.analysis.study.stats import crossed_interval, holm, paired_difference, pass_at_k, rank_sets
from qlens.core.errors import InputError
from qlens.core.files import user_path

FILES = {
    "results": "results.csv",
    "diagnostics": "diagnostics.csv",
    "rates": "rates.csv",
    "curves": "curves.csv",
    "truth": "truth.csv",
    "calibration": "calibration.csv",
    "trust": "figures/trust.csv",
    "target": "figures/target.csv",
}
AGAINST, WINNER = "sft", "target_sft"
MEANS = ("trust", "negative_mass", "kl_start", "nll")


@dataclass(frozen=True, eq=False)
class Study:
    """Methods trained side by side: print it, or use ``table()``, ``plot()``, ``save(dir)`` and the frames it came from.

    Args:
        config: what was run, and under "noted" how the settings measured, what failed and with which versions.
        results: setting, method, seed, item, score; one row each.
        diagnostics: setting, method, seed, and means over held-out tokens of the trained model (nats): nll, entropy,
            kl_start = KL(start || trained), trust, negative_mass; steps, seconds.
        rates: setting, method, recipe, learning_rate, validation (the mean score that a search saw; NaN without one),
            origin, at_edge, chosen.
        curves: setting, method, seed, step, score on the validation problems (your own data: the held-out rows).
        truth: setting, method, seed, when (start, end), belief (trust, Q, p: see ``held.beliefs``), labels (judged, all),
            auroc, good, noisy: how well the belief tells good labels from noisy ones; the lab only.
        calibration: setting, method, trust, good, n: in bins of trust at the start, the share of good labels.
        trust: setting, method, p_y, trust: effective trust on the starting model's held-out tokens.
        target: setting, method, token, label, p, q: targets at one held-out token of the starting model.
    """

    config: dict[str, Any]
    results: pd.DataFrame
    diagnostics: pd.DataFrame
    rates: pd.DataFrame
    curves: pd.DataFrame
    truth: pd.DataFrame
    calibration: pd.DataFrame
    trust: pd.DataFrame
    target: pd.DataFrame

    @classmethod
    def from_records(
        cls, config: dict[str, Any], records: Iterable[Mapping[str, Any]], choices: Mapping[tuple[str, str], Any]
    ) -> "Study":
        """A study from the jobs' records and the choices of recipes and rates."""
        return cls(config, **frames(config, records, choices))

    @property
    def label(self) -> str:
        """What the scores are, and which way is up."""
        return f"{self.config['metric']['name']} ({self.config['metric']['better']} is better)"

    @property
    def settings(self) -> list[str]:
        """The settings, in order."""
        return list(self.config["settings"])

    @property
    def methods(self) -> list[str]:
        """The methods that have results, in order."""
        there = set(self.results["method"])
        return [name for name in self.config["methods"] if name in there]

    def scores(self, setting: str) -> dict[str, pd.DataFrame]:
        """Of every method: scores by seed (rows) and item (columns)."""
        mine = self.results[self.results["setting"] == setting]
        return {
            str(method): cells.pivot(index="seed", columns="item", values="score")
            for method, cells in mine.groupby("method", sort=False)
        }

    def table(self) -> pd.DataFrame:
        """A row per setting and method: mean score with 95 % interval over seeds x items, rank, rate, diagnostics.

        Columns: setting, method, mean, low, high, seeds, items, n, note (``stats.crossed_interval``); pass_at_k, in the
        lab, with k the samples per problem; rank, best, worst (``stats.rank_sets``, per setting, of the methods that have all
        seeds); learning_rate, recipe, origin, at_edge; and trust, negative_mass, kl_start, nll, means over seeds.
        """
        return self._table.copy()

    @cached_property
    def _table(self) -> pd.DataFrame:
        rows = []
        means = self.diagnostics.groupby(["setting", "method"])[list(MEANS)].mean()
        rates = self.rates[self.rates["chosen"]].set_index(["setting", "method"])
        for setting in self.settings:
            scores, k = self.scores(setting), self.config["settings"][setting].get("k")
            most = max(len(cells) for cells in scores.values()) if scores else 0
            aligned = {name: cells.to_numpy() for name, cells in scores.items() if len(cells) == most}
            better = self.config["metric"]["better"]
            ranks = {each.name: each for each in rank_sets(aligned, better=better)} if aligned else {}
            for method, cells in scores.items():
                x = cells.to_numpy()
                i = crossed_interval(x)
                row = {"setting": setting, "method": method, "mean": i.mean, "low": i.low, "high": i.high}
                row |= {"seeds": i.seeds, "items": i.items, "n": i.n, "note": i.note}
                if k is not None:
                    row["pass_at_k"] = float(pass_at_k(np.rint(x * k), k, k).mean())
                if method in ranks:
                    row |= {name: getattr(ranks[method], name) for name in ("rank", "best", "worst")}
                chosen = rates.loc[(setting, method)]
                row |= {name: chosen[name] for name in ("learning_rate", "recipe", "origin", "at_edge")}
                rows.append({**row, **means.loc[(setting, method)]})
        return pd.DataFrame(rows)

    def differences(self, against: str | None = None, methods: Iterable[str] | None = None) -> pd.DataFrame:
        """Each method against one, paired by seed and item, with p-values corrected over all methods and settings.

        Columns: setting, method, against, mean, low, high, seeds, items, n, p, p_holm (Holm over the rows of this frame).
        The interval is of the single difference, not corrected.

        Args:
            against: the method to compare with; sft if it is there, else base.
            methods: which to compare; by default all.

        Raises:
            InputError: ``against`` or one of the methods has no results.
        """
        against = against or (AGAINST if AGAINST in self.methods else BASE)
        chosen = self.methods if methods is None else list(methods)
        for name in (against, *chosen):
            if name not in self.methods:
                raise InputError(f"no results of {name!r}; there are {', '.join(self.methods)}")
        rows = []
        for setting in self.settings:
            scores = self.scores(setting)
            for method in (name for name in chosen if name != against and {name, against} <= set(scores)):
                if not (shared := _shared([scores[method], scores[against]])):
                    continue
                i = paired_difference(*(scores[name].loc[shared].to_numpy() for name in (method, against)))
                row = {"setting": setting, "method": method, "against": against, "mean": i.mean}
                rows.append(
                    row | {"low": i.low, "high": i.high, "seeds": i.seeds, "items": i.items, "n": i.n, "p": i.p}
                )
        frame = pd.DataFrame(rows, columns=tables.DIFFERENCES[:-1])
        return frame.assign(p_holm=holm(frame["p"]))

    def controlled(self) -> pd.DataFrame:
        """target_sft against each control (a positive mean: target_sft scores more), as ``differences`` gives it.

        Empty where either is missing.
        """
        controls = [name for name in self.methods if name in CONTROLS]
        if WINNER not in self.methods or not controls:
            return pd.DataFrame(columns=tables.DIFFERENCES)
        found = self.differences(WINNER, controls)
        turned = {"mean": -found["mean"], "low": -found["high"], "high": -found["low"]}
        return found.assign(**turned, method=found["against"], against=found["method"])

    def curve(self) -> pd.DataFrame:
        """Learning curves: setting, method, step, mean, low, high; 95 % intervals over seeds alone."""
        rows = []
        for (setting, method, step), cells in self.curves.groupby(["setting", "method", "step"], sort=False):
            i = crossed_interval(cells[["score"]].to_numpy())
            rows.append(
                {"setting": setting, "method": method, "step": step, "mean": i.mean, "low": i.low, "high": i.high}
            )
        return pd.DataFrame(rows, columns=["setting", "method", "step", "mean", "low", "high"])

    def truths(self) -> pd.DataFrame:
        """How well each method's trust tells good labels from noisy ones: AUROCs over the judged labels.

        Columns: setting, method; ``trust`` and ``Q``: the method's own trust, and what its target gives the label, at the
        start; ``trust_end``, ``Q_end``, ``p_end``: the same at the trained model, and what that gives the label (mean
        over seeds); ``trust_all``: at the start, over all tokens, wordings included; good, noisy: how many were judged.
        """
        if self.truth.empty:
            return pd.DataFrame(columns=tables.TRUTHS)
        keys = ["setting", "method"]
        means = self.truth.groupby([*keys, "when", "belief", "labels"], sort=False)["auroc"].mean().unstack([2, 3, 4])
        places = {
            "trust": ("start", "trust", "judged"),
            "Q": ("start", "Q", "judged"),
            "trust_end": ("end", "trust", "judged"),
            "Q_end": ("end", "Q", "judged"),
            "p_end": ("end", "p", "judged"),
            "trust_all": ("start", "trust", "all"),
        }
        frame = pd.DataFrame({name: means[place] if place in means else np.nan for name, place in places.items()})
        counts = self.truth[self.truth["labels"] == "judged"].groupby(keys, sort=False)[["good", "noisy"]].max()
        return ordered(frame.join(counts).reset_index(), self.config)[tables.TRUTHS]

    def __str__(self) -> str:
        return tables.text(self)

    def to_markdown(self) -> str:
        """The tables in Markdown."""
        return tables.markdown(self)

    def to_latex(self) -> str:
        """The tables in LaTeX (booktabs)."""
        return tables.latex(self)

    def plot(self) -> Any:
        """The figure: scores, trust against p_y and the targets at one token, a row per setting (matplotlib)."""
        from qlens.analysis.plots import figure_study

        return figure_study(self)

    def save(self, folder: str | Path) -> None:
        """Write the run folder: config.json, the frames as CSV, table.md, figures/ and report.html."""
        from qlens.analysis.study.report import save

        save(self, user_path(folder, "folder"))

    @classmethod
    def load(cls, folder: str | Path) -> "Study":
        """A study from its run folder.

        Raises:
            InputError: a file of it is missing or damaged; it is named.
        """
        folder = user_path(folder, "folder")
        missing = [name for name in ("config.json", *FILES.values()) if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{folder} holds no finished study: {', '.join(missing)} missing")
        config = read_config(folder / "config.json", ("methods", "settings", "metric"))
        study = cls(config, **{name: read_frame(name, folder / file) for name, file in FILES.items()})
        check_results(study.results, config, folder / FILES["results"])
        return study


def _shared(scores: Iterable[pd.DataFrame]) -> list[int]:
    """The seeds that all have."""
    return sorted(set.intersection(*(set(cells.index) for cells in scores)))
