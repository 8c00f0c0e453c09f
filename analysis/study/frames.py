"""The records of a comparison's jobs as frames: long tables in the configuration's order."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qlens.core.errors import InputError, brief, one_line

TEXTS = ("setting", "method", "token", "recipe", "origin", "when", "belief", "labels")  # columns of text
TRUTHS = ("at_edge", "chosen", "label")  # columns of truth values
RESULTS = ("setting", "method", "seed", "item", "score")
DIAGNOSTICS = ("nll", "entropy", "kl_start", "trust", "negative_mass", "steps", "seconds")
COLUMNS = {
    "rates": ("setting", "method", "recipe", "learning_rate", "validation", "origin", "at_edge", "chosen"),
    "curves": ("setting", "method", "seed", "step", "score"),
    "truth": ("setting", "method", "seed", "when", "belief", "labels", "auroc", "good", "noisy"),
    "calibration": ("setting", "method", "trust", "good", "n"),
    "trust": ("setting", "method", "p_y", "trust"),
    "target": ("setting", "method", "token", "label", "p", "q"),
}


def frames(
    config: Mapping[str, Any], records: Iterable[Mapping[str, Any]], choices: Mapping[tuple[str, str], Any]
) -> dict[str, pd.DataFrame]:
    """The frames of a Study, by name, from the jobs' records and the choices of recipes and rates."""
    found: dict[str, list[Any]] = {name: [] for name in ("results", "diagnostics", *COLUMNS)}
    for record in records:
        place = {name: record[name] for name in ("setting", "method")}
        key = place | {"seed": record["seed"]}
        found["results"].append(pd.DataFrame({**key, "item": range(len(record["scores"])), "score": record["scores"]}))
        found["diagnostics"].append({**key, **record["diagnostics"]})
        found["curves"] += [{**key, "step": step, "score": score} for step, score in record["curve"]]
        found["truth"] += [{**key, **row} for row in record["truth"]]
        for name, columns in record.get("reading", {}).items():
            found[name].append(pd.DataFrame({**place, **columns}))
    found["rates"] = [row for place, choice in choices.items() for row in _rates(*place, choice)]
    made = {name: ordered(_frame(name, parts), config) for name, parts in found.items()}
    return made | {"diagnostics": made["diagnostics"].astype({"trust": float, "negative_mass": float})}


def record_fault(record: Any) -> str:
    """What is wrong with a job's record; nothing where frames can be made from it."""
    kinds = {"setting": str, "method": str, "seed": int, "made_with": dict, "scores": list, "curve": list}
    kinds |= {"diagnostics": dict, "truth": list}
    if not isinstance(record, dict):
        return f"it holds {brief(record)}, not a record"
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            return f"its {name} is {brief(record.get(name))}"
    if not record["scores"] or not all(_is_number(score) for score in record["scores"]):
        return "its scores are not finite numbers"
    if not all(
        isinstance(point, list) and len(point) == 2 and all(map(_is_number, point)) for point in record["curve"]
    ):
        return "its curve is not pairs of step and score"
    if lacking := [name for name in DIAGNOSTICS if name not in record["diagnostics"]]:
        return f"its diagnostics lack {lacking[0]}"
    told = set(COLUMNS["truth"]) - {"setting", "method", "seed"}
    if not all(isinstance(row, dict) and told <= set(row) for row in record["truth"]):
        return "its truth lacks columns"
    for name, columns in record.get("reading", {}).items():
        wanted = set(COLUMNS.get(name, ())) - {"setting", "method"}
        if not wanted or not isinstance(columns, dict) or not wanted <= set(columns):
            return f"its reading of {brief(name)} lacks columns"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def read_frame(name: str, path: Path) -> pd.DataFrame:
    """A frame of a Study from its CSV.

    Raises:
        InputError: the file is cut off, has other columns, or text where numbers belong.
    """
    read: dict[str, Any] = {"dtype": dict.fromkeys(TEXTS, str), "keep_default_na": False}
    read["na_values"] = {column: [""] for column in ("trust", "negative_mass", "validation", "auroc")}
    try:
        frame = pd.read_csv(path, **read)
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise InputError(f"{path} is damaged: {one_line(str(error), 200)}") from error
    wanted = {"results": RESULTS, "diagnostics": ("setting", "method", "seed", *DIAGNOSTICS)} | COLUMNS
    if lacking := [column for column in wanted[name] if column not in frame]:
        raise InputError(f"{path} is damaged: it has no column {lacking[0]!r}, only {', '.join(map(str, frame))}")
    for column in (each for each in wanted[name] if each not in (*TEXTS, *TRUTHS)):
        if len(frame) and not pd.api.types.is_numeric_dtype(frame[column]):
            raise InputError(f"{path} is damaged: its column {column!r} holds what is no number")
    return frame


def check_results(results: pd.DataFrame, config: Mapping[str, Any], path: Path) -> None:
    """Whether results are whole: known settings and methods, and of every seed as many finite scores as of the others.

    Raises:
        InputError: they are not.
    """
    if wrong := [name for name in ("name", "better", "note") if not isinstance(config["metric"].get(name), str)]:
        raise InputError(f"{path.with_name('config.json')} is damaged: metric.{wrong[0]} is not there")
    for name, known in (("setting", config["settings"]), ("method", config["methods"])):
        if strange := sorted(set(results[name]) - set(known) - {"base"}):
            raise InputError(f"{path} is damaged: its {name} {brief(strange[0])} is not in config.json")
    if not len(results) or not np.isfinite(results["score"]).all():
        raise InputError(f"{path} is damaged: it holds no scores, or some that are not finite")
    for setting, cells in results.groupby("setting"):
        counts = cells.groupby(["method", "seed"])["item"].agg(["size", "nunique"])
        if counts.to_numpy().min() != counts.to_numpy().max():
            short: Any = counts["size"].idxmin()
            raise InputError(
                f"{path} is damaged: {setting}: {short[0]} at seed {short[1]} lacks items, or has them twice"
            )


def ordered(frame: pd.DataFrame, config: Mapping[str, Any]) -> pd.DataFrame:
    """Sorted by setting, method, seed and item, as far as there are such columns, in the configuration's order."""
    ranks = {name: {each: rank for rank, each in enumerate(config[name + "s"])} for name in ("setting", "method")}
    keys = [name for name in ("setting", "method", "seed", "item") if name in frame]
    return frame.sort_values(
        keys, kind="stable", ignore_index=True, key=lambda c: c.map(ranks[c.name]) if c.name in ranks else c
    )


def _rates(setting: str, method: str, choice: Any) -> list[dict[str, Any]]:
    """What a choice was made from, a row per recipe and rate; the one row chosen where there was no search."""
    taken = (choice.recipe.spec, choice.learning_rate)
    seen = {(s, float(rate)): float(np.mean(v)) for s, rates in choice.scores.items() for rate, v in rates.items()}
    fixed = {"setting": setting, "method": method, "origin": choice.origin}
    return [
        {**fixed, "recipe": s, "learning_rate": rate, "validation": mean, "chosen": (s, rate) == taken}
        | {"at_edge": choice.at_edge and (s, rate) == taken}
        for (s, rate), mean in (seen or {taken: np.nan}).items()
    ]


def _frame(name: str, parts: list[Any]) -> pd.DataFrame:
    if not parts:
        return pd.DataFrame(columns=list(COLUMNS.get(name, ())))
    frame = pd.concat(parts, ignore_index=True) if isinstance(parts[0], pd.DataFrame) else pd.DataFrame(parts)
    return frame[list(COLUMNS[name])] if name in COLUMNS else frame
