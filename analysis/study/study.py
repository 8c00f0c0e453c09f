"""Study: the result of a comparison as frames, printed, drawn and saved from them."""

import json
from collections.abc import Iterable, Mapping, Sequence
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
from qlens.core.deprecation import warn
from qlens.core.deprecation.columns import renamed_columns
from qlens.core.display import Result
from qlens.core.errors import InputError
from qlens.core.files import user_path

FILES = {
    "results": "results.csv",
    "diagnostics": "diagnostics.csv",
    "rates": "rates.csv",
    "curves": "curves.csv",
    "truth": "truth.csv",
    "calibration": "calibration.csv",
    "label_weight": "figures/label_weight.csv",
    "target": "figures/target.csv",
}
OLD_FILES = {"label_weight": "figures/trust.csv"}  # names of earlier versions
AGAINST, WINNER = "sft", "target_sft"
MEANS = ("label_weight", "negative_mass", "kl_start", "nll")


@dataclass(frozen=True, eq=False, repr=False)
class Study(Result):
    """Methods trained side by side: ``print`` it, or use ``table()``, ``plot()``, ``save(dir)`` and its frames.

    Args:
        config: the configuration; under "noted" the measurements of the settings and the failed jobs.
        results: one row per setting, method, seed and item, with its score.
        diagnostics: per setting, method and seed, means over held-out tokens of the trained model in nats: nll, entropy,
            kl_start = KL(start || trained), label_weight = sum(-g_y) / sum(1 - p_y), negative_mass; steps, seconds.
        rates: setting, method, recipe, learning_rate, validation (the mean score in the search; NaN without one), origin,
            at_edge, chosen.
        curves: setting, method, seed, step, score on the validation problems (on user data: the held-out rows).
        truth: AUROCs of scores that separate correct from noisy labels, lab only: setting, method, seed, when (start, end),
            belief (the score: trust, Q or p, see ``evaluation.label_scores``), labels (judged, all), auroc, good, noisy.
        calibration: setting, method, trust, good, n: the share of correct labels in bins of trust at the start.
        label_weight: setting, method, p_y, label_weight = -g_y / (1 - p_y) on held-out tokens of the starting model.
        target: setting, method, token, label, p, q: targets at one held-out token of the starting model.

    Example:
        >>> study = Study.load("runs/compare")                                             # doctest: +SKIP
        >>> study.to_latex(columns=["method", "avg@8", "p (Holm)"], caption="Five seeds.")  # doctest: +SKIP
    """

    config: dict[str, Any]
    results: pd.DataFrame
    diagnostics: pd.DataFrame
    rates: pd.DataFrame
    curves: pd.DataFrame
    truth: pd.DataFrame
    calibration: pd.DataFrame
    label_weight: pd.DataFrame
    target: pd.DataFrame

    @classmethod
    def from_records(
        cls, config: dict[str, Any], records: Iterable[Mapping[str, Any]], choices: Mapping[tuple[str, str], Any]
    ) -> "Study":
        """A study from the records of jobs and the choices of recipes and learning rates."""
        return cls(config, **frames(config, records, choices))

    @property
    def label(self) -> str:
        """Name of the metric and its direction."""
        return f"{self.config['metric']['name']} ({self.config['metric']['better']} is better)"

    @property
    def settings(self) -> list[str]:
        """The settings, in order."""
        return list(self.config["settings"])

    @property
    def methods(self) -> list[str]:
        """The methods that have results, in order."""
        present = set(self.results["method"])
        return [name for name in self.config["methods"] if name in present]

    @property
    def trust(self) -> pd.DataFrame:
        """The old name of ``label_weight``."""
        warn("Study.trust", "Study.label_weight")
        return self.label_weight.rename(columns={"label_weight": "trust"})

    def scores(self, setting: str) -> dict[str, pd.DataFrame]:
        """Scores of one setting by method: seeds in rows, items in columns."""
        in_setting = self.results[self.results["setting"] == setting]
        return {
            str(method): cells.pivot(index="seed", columns="item", values="score")
            for method, cells in in_setting.groupby("method", sort=False)
        }

    def table(self) -> pd.DataFrame:
        """A row per setting and method: mean score with a 95 % interval over seeds x items, rank, rate, diagnostics.

        Returns:
            columns setting, method; mean, low, high, seeds, items, n, note (``stats.crossed_interval``); in the lab
            pass_at_k, with k the samples per problem; rank, best, worst (``stats.rank_sets``, per setting, of the methods
            that have all seeds); learning_rate, recipe, origin, at_edge; label_weight, negative_mass, kl_start, nll
            (means over seeds).
        """
        return renamed_columns(self._table.copy())

    to_frame = table

    @cached_property
    def _table(self) -> pd.DataFrame:
        rows = []
        means = self.diagnostics.groupby(["setting", "method"])[list(MEANS)].mean()
        rates = self.rates[self.rates["chosen"]].set_index(["setting", "method"])
        for setting in self.settings:
            scores, k = self.scores(setting), self.config["settings"][setting].get("k")
            seeds = max(len(cells) for cells in scores.values()) if scores else 0
            complete = {name: cells.to_numpy() for name, cells in scores.items() if len(cells) == seeds}
            better = self.config["metric"]["better"]
            ranks = {each.name: each for each in rank_sets(complete, better=better)} if complete else {}
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

        Args:
            against: the method to compare with; by default sft if it has results, else base.
            methods: which to compare; by default all.

        Returns:
            columns setting, method, against, mean, low, high, seeds, items, n, p and p_holm (Holm over the rows of this
            frame). The interval is of the single difference, not corrected.

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
                if not (shared := sorted(set(scores[method].index) & set(scores[against].index))):
                    continue
                i = paired_difference(*(scores[name].loc[shared].to_numpy() for name in (method, against)))
                row = {"setting": setting, "method": method, "against": against, "mean": i.mean}
                rows.append(
                    row | {"low": i.low, "high": i.high, "seeds": i.seeds, "items": i.items, "n": i.n, "p": i.p}
                )
        frame = pd.DataFrame(rows, columns=tables.DIFFERENCES[:-1])
        return frame.assign(p_holm=holm(frame["p"]))

    def control_differences(self) -> pd.DataFrame:
        """target_sft against each control, as ``differences`` returns it; a positive mean: target_sft scores more.

        Empty without target_sft or without controls.
        """
        controls = [name for name in self.methods if name in CONTROLS]
        if WINNER not in self.methods or not controls:
            return pd.DataFrame(columns=tables.DIFFERENCES)
        table = self.differences(WINNER, controls)
        negated = {"mean": -table["mean"], "low": -table["high"], "high": -table["low"]}
        return table.assign(**negated, method=table["against"], against=table["method"])

    def controlled(self) -> pd.DataFrame:
        """The old name of ``control_differences``."""
        warn("Study.controlled()", "Study.control_differences()")
        return self.control_differences()

    def curve(self) -> pd.DataFrame:
        """Learning curves: setting, method, step, mean, low, high; 95 % intervals over seeds alone."""
        rows = []
        for (setting, method, step), cells in self.curves.groupby(["setting", "method", "step"], sort=False):
            i = crossed_interval(cells[["score"]].to_numpy())
            rows.append(
                {"setting": setting, "method": method, "step": step, "mean": i.mean, "low": i.low, "high": i.high}
            )
        return pd.DataFrame(rows, columns=["setting", "method", "step", "mean", "low", "high"])

    def label_auroc(self) -> pd.DataFrame:
        """AUROCs with which each method separates correct labels from noisy ones; the lab only, which knows them.

        Returns:
            columns setting, method; ``trust``, ``Q``: AUROC of the method's trust, and of its target at the label, before
            training; ``trust_end``, ``Q_end``, ``p_end``: the same, and of p_y, after training (mean over seeds);
            ``trust_all``: before training, over all tokens, with those that no fact decides taken as correct; good,
            noisy: how many labels are correct or not.
        """
        if self.truth.empty:
            return pd.DataFrame(columns=tables.AUROC)
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
        return ordered(frame.join(counts).reset_index(), self.config)[tables.AUROC]

    def truths(self) -> pd.DataFrame:
        """The old name of ``label_auroc``."""
        warn("Study.truths()", "Study.label_auroc()")
        return self.label_auroc()

    def __str__(self) -> str:
        return tables.text(self)

    def __repr__(self) -> str:
        sizes = f"{len(self.methods)} methods x {len(self.settings)} settings x {len(self.config['seeds'])} seeds"
        return f"<Study of {sizes}, {self.label}: {', '.join(self.methods)}>"

    def _repr_html_(self) -> str:
        return tables.html(self)

    def to_markdown(self) -> str:
        """The printed tables in Markdown."""
        return tables.markdown(self)

    def to_latex(
        self, columns: Sequence[str] | None = None, caption: str | None = None, label: str | None = None, **options: Any
    ) -> str:
        r"""The printed tables in LaTeX (booktabs).

        Args:
            columns: columns of the settings' tables as they are printed ("method", "avg@8", ...); by default all columns
                of all tables.
            caption: of every table; without it and ``label`` plain tabulars.
            label: of the first table; the others have label-2, label-3 and so on.
            options: as of ``qlens.core.display.latex_table``.

        Raises:
            InputError: a column that the tables do not have.
        """
        return tables.latex(self, columns, caption, label, **options)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: config, table (a dict per row), differences; NaN as None."""
        records = {
            name: json.loads(getattr(self, name)().to_json(orient="records")) for name in ("table", "differences")
        }
        return {"config": self.config, **records}

    def plot(self) -> Any:
        """A matplotlib figure, a row per setting: scores, label weight against p_y, and the targets at one token."""
        from qlens.analysis.plots import figure_study

        return figure_study(self)

    def save(self, folder: str | Path) -> None:
        """Write the run folder: config.json, the frames as CSV, table.md, figures/ (PNG and PDF) and report.html."""
        from qlens.analysis.study.report import save

        save(self, user_path(folder, "folder"))

    @classmethod
    def load(cls, folder: str | Path) -> "Study":
        """A study from its run folder.

        Raises:
            InputError: a file is missing or damaged; it is named.
        """
        folder = user_path(folder, "folder")
        files = {name: folder / file for name, file in FILES.items()}
        for name, old in OLD_FILES.items():
            if not files[name].is_file() and (folder / old).is_file():
                files[name] = folder / old
        missing = [
            str(path.relative_to(folder)) for path in (folder / "config.json", *files.values()) if not path.is_file()
        ]
        if missing:
            raise InputError(f"{folder} holds no finished study: {', '.join(missing)} missing")
        config = read_config(folder / "config.json", ("methods", "settings", "metric"))
        study = cls(config, **{name: read_frame(name, path) for name, path in files.items()})
        check_results(study.results, config, folder / FILES["results"])
        return study
