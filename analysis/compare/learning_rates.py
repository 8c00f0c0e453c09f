"""The learning rate of every method: one grid, one rule on validation problems, and the record that comes with the lab.

``python -m qlens.analysis.compare.learning_rates`` searches anew for all settings, built-in methods and controls, and
writes the record.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import qlens.lab
from qlens.analysis.compare.environments import Lab, Source, open_ground
from qlens.analysis.compare.jobs import Task, run_all, slug
from qlens.analysis.compare.recipes import BASE, GROUPS, Recipe, recipes
from qlens.analysis.compare.run_folder import claimed, code, versions
from qlens.core.errors import InputError
from qlens.core.files import write_json
from qlens.lab import SETTINGS, Setting, build
from qlens.lab.environment import VERSION
from qlens.training.fitting import isolated

GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (100, 101, 102)  # other batches and samples than any comparison with up to a hundred seeds
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
    """What a method is trained with in a setting.

    Args:
        recipe, learning_rate: of all its jobs.
        origin: who chose them: "given", "record", "record of other steps", "search", "as sft" (sft's in the record) or
            "default" (the setting's).
        scores: what the rule saw, empty where there was nothing to choose.
    """

    recipe: Recipe
    learning_rate: float
    origin: str
    scores: Scores

    @property
    def at_edge(self) -> bool:
        """Whether the best of the rates tried is the smallest or the largest: a better one may lie beyond."""
        seen = {float(rate): np.mean(scores) for rate, scores in self.scores.get(self.recipe.spec, {}).items()}
        return len(seen) > 1 and max(seen, key=lambda rate: seen[rate]) in (min(seen), max(seen))

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {"recipe": self.recipe.spec, "learning_rate": self.learning_rate, "origin": self.origin}


@dataclass(frozen=True, kw_only=True)
class Trial(Task):
    """A recipe at a rate and a seed, scored on the validation problems."""

    part: ClassVar[str] = "search"

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.source.name}--{slug(self.method)}--{slug(self.recipe.spec)}--{self.learning_rate}--{self.seed}"

    def fault(self, record: Any) -> str:
        """What is wrong with a record; nothing where it is one."""
        score = record.get("score") if isinstance(record, dict) else None
        return "" if isinstance(score, int | float) and np.isfinite(score) else "it holds no finite score"

    def work(self) -> dict[str, Any]:
        """Train and validate."""
        ground = open_ground(self.source)
        with isolated(self.seed):
            model = ground.start()
            self.train(ground, model)
            score = float(ground.validate(model, self.seed).mean())
        return {"score": round(score, 6)}


def choose(scores: Scores) -> tuple[str, float]:
    """The recipe and the rate that the rule takes.

    Example:
        >>> choose({"sft": {"0.001": [0.70, 0.72], "0.003": [0.71, 0.72], "0.01": [0.5, 0.5]}})
        ('sft', 0.001)
    """
    means = {(s, float(rate)): np.mean(seen) for s, rates in scores.items() for rate, seen in rates.items()}
    near = [each for each, mean in means.items() if mean >= max(means.values()) - MARGIN - 1e-12]
    smallest = min(rate for _, rate in near)
    return max((each for each in near if each[1] == smallest), key=lambda each: means[each])


def recorded(source: Source, method: str) -> Scores:
    """What the record says of a method in a setting; empty if nothing, or if the setting's numbers have changed."""
    if not isinstance(source, Lab):
        return {}
    found = _record().get(source.name, {})
    same = found.get("key") == source.setting.key and found.get("lab") == VERSION
    return found["scores"].get(method, {}) if same else {}


def settle(
    source: Source, method: str, among: Sequence[Recipe], given: float | None, lr_grid: bool
) -> Choice | tuple[float, ...]:
    """The choice for a method in a setting, or the rates that must be tried before it can be made.

    Raises:
        InputError: several recipes to choose from, and neither a record nor ``lr_grid``.
    """
    if among[0].variant is None:
        return Choice(recipe=among[0], learning_rate=0.0, origin="", scores={})
    if given is not None and len(among) == 1:
        return Choice(recipe=among[0], learning_rate=given, origin="given", scores={})
    record = recorded(source, method)
    rates = GRID if given is None else (given,)
    known = {each.spec: {str(rate): record.get(each.spec, {}).get(str(rate)) for rate in rates} for each in among}
    covered = all(seen for of_recipe in known.values() for seen in of_recipe.values())
    if covered and not (lr_grid and _other_steps(source)):
        return chosen(among, known, OTHER_STEPS if _other_steps(source) else "record")
    if lr_grid:
        return rates
    if len(among) > 1 and not isinstance(source, Lab):
        raise InputError(f"{method} is chosen on validation problems, which only the lab has: leave it out of variants")
    if len(among) > 1:
        raise InputError(f"{method} is chosen on validation problems, and nothing is recorded for it: give lr_grid")
    if record := recorded(source, "sft"):
        return Choice(recipe=among[0], learning_rate=choose(record)[1], origin="as sft", scores={})
    return Choice(recipe=among[0], learning_rate=open_ground(source).learning_rate, origin="default", scores={})


def trials(source: Source, method: str, among: Sequence[Recipe], rates: Sequence[float], folder: Path) -> list[Trial]:
    """Every recipe at every rate and seed of the search."""
    common: dict[str, Any] = {"folder": folder, "source": source, "method": method}
    return [Trial(**common, recipe=r, learning_rate=rate, seed=s) for r in among for rate in rates for s in SEEDS]


def chosen(among: Sequence[Recipe], scores: Scores, origin: str) -> Choice:
    """The rule's choice as a Choice."""
    spec, rate = choose(scores)
    recipe = next(each for each in among if each.spec == spec)
    return Choice(recipe=recipe, learning_rate=rate, origin=origin, scores=scores)


def gathered(trials: Iterable[Trial]) -> dict[str, dict[str, list[float]]]:
    """The scores of finished trials of one method in one setting; a rate that failed at a seed is left out."""
    found: dict[str, dict[str, list[float]]] = {}
    failed = set()
    for trial in trials:
        record, rate = trial.finished(), str(trial.learning_rate)
        found.setdefault(trial.recipe.spec, {}).setdefault(rate, [])
        if record is None:
            failed.add((trial.recipe.spec, rate))
        else:
            found[trial.recipe.spec][rate].append(record["score"])
    kept = {s: {r: seen for r, seen in rates.items() if (s, r) not in failed} for s, rates in found.items()}
    return {spec: rates for spec, rates in kept.items() if rates}


def _other_steps(source: Source) -> bool:
    """Whether the record is of another number of steps."""
    return source.steps is not None and not (isinstance(source, Lab) and source.steps == source.setting.steps)


def _record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))["settings"] if RECORD.is_file() else {}


def main(argv: list[str] | None = None) -> None:
    """Search for every built-in method and control in every setting, and write the record; resumes where it stopped."""
    parser = argparse.ArgumentParser(prog="python -m qlens.analysis.compare.learning_rates", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/search"), help="where finished trials are kept")
    parser.add_argument("--record", type=Path, default=RECORD, help="the file to write")
    parser.add_argument("--jobs", type=int, help="parallel processes (all cores)")
    options = parser.parse_args(argv)
    build(list(SETTINGS.values()))
    rows = {name: among for name, among in recipes([*GROUPS["default"], *GROUPS["controls"]]).items() if name != BASE}
    state = {"code": code(), "versions": versions(), "grid": GRID, "seeds": SEEDS, "lab": VERSION}
    with claimed(options.out, json.loads(json.dumps(state))):
        found = {each.name: _searched(each, rows, options.out, options.jobs) for each in SETTINGS.values()}
    write_json(options.record, {"rule": RULE, "grid": GRID, "seeds": SEEDS, "settings": found})


def _searched(
    setting: Setting, rows: Mapping[str, Sequence[Recipe]], out: Path, processes: int | None
) -> dict[str, Any]:
    """A setting's part of the record."""
    folder = out / f"{setting.name}-{setting.key}"
    tried = {name: trials(Lab(setting), name, among, GRID, folder) for name, among in rows.items()}
    left = [trial for of_method in tried.values() for trial in of_method if trial.finished() is None]
    run_all(left, processes, True, f"searching {setting.name}")
    if failed := [trial for trial in left if trial.finished() is None]:
        raise SystemExit(f"{len(failed)} trials failed, see {failed[0].trace}")
    scores = {name: gathered(of_method) for name, of_method in tried.items()}
    return {"key": setting.key, "lab": VERSION, "scores": scores}


if __name__ == "__main__":
    main()
