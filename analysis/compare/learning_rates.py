"""Learning rates: one grid for all methods, one rule on validation problems, and the record that ships with the lab.

``python -m qlens.analysis.compare.learning_rates`` repeats the search for all settings, methods and controls, and writes
the record.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import qlens.lab
from qlens.analysis.compare.environments import LabSource, open_environment
from qlens.analysis.compare.jobs import Task, slug
from qlens.analysis.compare.recipes import BASE, GROUPS, Recipe, recipes
from qlens.analysis.compare.run_folder import code, locked, versions
from qlens.analysis.compare.schedule import run_all
from qlens.analysis.compare.user_source import Source
from qlens.core.errors import InputError
from qlens.core.files import write_json
from qlens.core.progress import track
from qlens.lab import SETTINGS, Setting, build
from qlens.lab.environment import VERSION
from qlens.training.fitting import isolated

GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (100, 101, 102)  # disjoint from the seeds of comparisons
MARGIN = 0.01
RULE = (
    "of all whose mean validation score over the seeds is within .01 of the best, the smallest rate, and among several "
    "recipes at that rate the best one"
)
OTHER_STEPS = "record of other steps"
RECORD = Path(qlens.lab.__file__).with_name("rates.json")

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""Mean validation scores by recipe, rate (as text) and seed."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Recipe and learning rate of a method in a setting.

    Args:
        recipe, learning_rate: of all its jobs.
        origin: "given", "record", "record of other steps", "search", "as sft" (sft's in the record) or "default" (the
            setting's).
        scores: validation scores that the rule chose by; empty without a choice.
    """

    recipe: Recipe
    learning_rate: float
    origin: str
    scores: Scores

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or the largest of those tried."""
        means = {float(rate): np.mean(scores) for rate, scores in self.scores.get(self.recipe.spec, {}).items()}
        return len(means) > 1 and max(means, key=lambda rate: means[rate]) in (min(means), max(means))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"recipe": self.recipe.spec, "learning_rate": self.learning_rate, "origin": self.origin}


@dataclass(frozen=True, kw_only=True)
class Trial(Task):
    """A recipe at a rate and a seed, scored on the validation problems."""

    part: ClassVar[str] = "search"

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.source.name}--{slug(self.method)}--{slug(self.recipe.spec)}--{self.learning_rate}--{self.seed}"

    def fault(self, record: Any) -> str:
        """The fault of a record in words; empty if there is none."""
        score = record.get("score") if isinstance(record, dict) else None
        return "" if isinstance(score, int | float) and np.isfinite(score) else "it holds no finite score"

    def work(self) -> dict[str, Any]:
        """Train and validate."""
        environment = open_environment(self.source)
        with isolated(self.seed):
            model = environment.start()
            self.train(environment, model)
            score = float(environment.validate(model, self.seed).mean())
        return {"score": round(score, 6)}


def choose(scores: Scores) -> tuple[str, float]:
    """Recipe and learning rate by the rule.

    Example:
        >>> choose({"sft": {"0.001": [0.70, 0.72], "0.003": [0.71, 0.72], "0.01": [0.5, 0.5]}})
        ('sft', 0.001)
    """
    means = {(s, float(rate)): np.mean(values) for s, rates in scores.items() for rate, values in rates.items()}
    near = [each for each, mean in means.items() if mean >= max(means.values()) - MARGIN - 1e-12]
    smallest = min(rate for _, rate in near)
    return max((each for each in near if each[1] == smallest), key=lambda each: means[each])


def recorded(source: Source, method: str) -> Scores:
    """Recorded scores of a method in a setting; empty without any, or if the setting has changed."""
    if not isinstance(source, LabSource):
        return {}
    record = _record().get(source.name, {})
    same = record.get("key") == source.setting.key and record.get("lab") == VERSION
    return record["scores"].get(method, {}) if same else {}


def settle(
    source: Source, method: str, recipes: Sequence[Recipe], learning_rate: float | None, lr_grid: bool
) -> Choice | tuple[float, ...]:
    """The choice for a method in a setting, or the rates to search first.

    Raises:
        InputError: several recipes, and neither a record nor ``lr_grid``.
    """
    first, several = recipes[0], len(recipes) > 1
    if first.variant is None:
        return Choice(recipe=first, learning_rate=0.0, origin="", scores={})
    if learning_rate is not None and not several:
        return Choice(recipe=first, learning_rate=learning_rate, origin="given", scores={})
    record = recorded(source, method)
    rates = GRID if learning_rate is None else (learning_rate,)
    recorded_scores = {
        each.spec: {str(rate): record.get(each.spec, {}).get(str(rate)) for rate in rates} for each in recipes
    }
    complete = all(scores for of_recipe in recorded_scores.values() for scores in of_recipe.values())
    if complete and not (lr_grid and _other_steps(source)):
        return chosen(recipes, recorded_scores, OTHER_STEPS if _other_steps(source) else "record")
    if lr_grid:
        return rates
    if several and not isinstance(source, LabSource):
        raise InputError(f"{method} is chosen on validation problems, which only the lab has: leave it out of variants")
    if several:
        raise InputError(f"{method} is chosen on validation problems, and nothing is recorded for it: give lr_grid")
    if record := recorded(source, "sft"):
        return Choice(recipe=first, learning_rate=choose(record)[1], origin="as sft", scores={})
    return Choice(recipe=first, learning_rate=source.learning_rate, origin="default", scores={})


def trials(source: Source, method: str, recipes: Sequence[Recipe], rates: Sequence[float], folder: Path) -> list[Trial]:
    """Every recipe at every rate and seed of the search."""
    common: dict[str, Any] = {"folder": folder, "source": source, "method": method}
    return [Trial(**common, recipe=r, learning_rate=rate, seed=s) for r in recipes for rate in rates for s in SEEDS]


def chosen(recipes: Sequence[Recipe], scores: Scores, origin: str) -> Choice:
    """The choice by the rule."""
    spec, rate = choose(scores)
    recipe = next(each for each in recipes if each.spec == spec)
    return Choice(recipe=recipe, learning_rate=rate, origin=origin, scores=scores)


def gathered(trials: Iterable[Trial]) -> dict[str, dict[str, list[float]]]:
    """Scores of the finished trials of one method in one setting, without rates that failed at a seed."""
    scores: dict[str, dict[str, list[float]]] = {}
    failed = set()
    for trial in trials:
        record, rate = trial.finished(), str(trial.learning_rate)
        scores.setdefault(trial.recipe.spec, {}).setdefault(rate, [])
        if record is None:
            failed.add((trial.recipe.spec, rate))
        else:
            scores[trial.recipe.spec][rate].append(record["score"])
    whole = {s: {r: values for r, values in rates.items() if (s, r) not in failed} for s, rates in scores.items()}
    return {spec: rates for spec, rates in whole.items() if rates}


def _other_steps(source: Source) -> bool:
    """Whether the source trains for other steps than its setting."""
    return source.steps is not None and not (isinstance(source, LabSource) and source.steps == source.setting.steps)


def _record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))["settings"] if RECORD.is_file() else {}


def main(argv: list[str] | None = None) -> None:
    """Search for every method and control in every setting, and write the record; an interrupted search is resumed."""
    parser = argparse.ArgumentParser(prog="python -m qlens.analysis.compare.learning_rates", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/search"), help="folder of the finished trials")
    parser.add_argument("--record", type=Path, default=RECORD, help="the file to write")
    parser.add_argument("--jobs", type=int, help="parallel processes (all cores)")
    options = parser.parse_args(argv)
    build(list(SETTINGS.values()))
    rows = recipes([*GROUPS["default"], *GROUPS["controls"]])
    del rows[BASE]
    state = {"code": code(), "versions": versions(), "grid": GRID, "seeds": SEEDS, "lab": VERSION}
    with locked(options.out, json.loads(json.dumps(state))):
        scores = {each.name: _searched(each, rows, options.out, options.jobs) for each in SETTINGS.values()}
    write_json(options.record, {"rule": RULE, "grid": GRID, "seeds": SEEDS, "settings": scores})


def _searched(
    setting: Setting, rows: Mapping[str, Sequence[Recipe]], out: Path, processes: int | None
) -> dict[str, Any]:
    """A setting's part of the record."""
    folder = out / f"{setting.name}-{setting.key}"
    by_method = {name: trials(LabSource(setting), name, among, GRID, folder) for name, among in rows.items()}
    unfinished = [trial for of_method in by_method.values() for trial in of_method if trial.finished() is None]
    if unfinished:
        for _ in track(run_all(unfinished, processes), len(unfinished), f"searching {setting.name}"):
            pass
    if failed := [trial for trial in unfinished if trial.finished() is None]:
        raise SystemExit(f"{len(failed)} trials failed, see {failed[0].trace}")
    scores = {name: gathered(of_method) for name, of_method in by_method.items()}
    return {"key": setting.key, "lab": VERSION, "scores": scores}


if __name__ == "__main__":
    main()
