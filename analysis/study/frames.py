"""Frames of a study: from the records of its jobs, and from CSV files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qlens.core.deprecation.columns import current_columns
from qlens.core.errors import InputError, brief, one_line

TEXT_COLUMNS = ("setting", "method", "token", "recipe", "origin", "when", "belief", "labels")
BOOL_COLUMNS = ("at_edge", "chosen", "label")
RESULTS = ("setting", "method", "seed", "item", "score")
DIAGNOSTICS = ("nll", "entropy", "kl_start", "label_weight", "negative_mass", "steps", "seconds")
COLUMNS = {
    "rates": ("setting", "method", "recipe", "learning_rate", "validation", "origin", "at_edge", "chosen"),
    "curves": ("setting", "method", "seed", "step", "score"),
    "truth": ("setting", "method", "seed", "when", "belief", "labels", "auroc", "good", "noisy"),
    "calibration": ("setting", "method", "trust", "good", "n"),
    "label_weight": ("setting", "method", "p_y", "label_weight"),
    "target": ("setting", "method", "token", "label", "p", "q"),
}


def frames(
    config: Mapping[str, Any], records: Iterable[Mapping[str, Any]], choices: Mapping[tuple[str, str], Any]
) -> dict[str, pd.DataFrame]:
    """The frames of a Study by name.

    Args:
        config: the configuration of the comparison.
        records: one per finished job.
        choices: recipe and learning rate by setting and method.
    """
    parts: dict[str, list[Any]] = {name: [] for name in ("results", "diagnostics", *COLUMNS)}
    for record in records:
        place = {name: record[name] for name in ("setting", "method")}
        key = place | {"seed": record["seed"]}
        parts["results"].append(pd.DataFrame({**key, "item": range(len(record["scores"])), "score": record["scores"]}))
        parts["diagnostics"].append({**key, **record["diagnostics"]})
        parts["curves"] += [{**key, "step": step, "score": score} for step, score in record["curve"]]
        parts["truth"] += [{**key, **row} for row in record["truth"]]
        for name, columns in record.get("reading", {}).items():
            parts[name].append(pd.DataFrame({**place, **columns}))
    parts["rates"] = [row for place, choice in choices.items() for row in _rates(*place, choice)]
    tables = {name: ordered(_frame(name, rows), config) for name, rows in parts.items()}
    return tables | {"diagnostics": tables["diagnostics"].astype({"label_weight": float, "negative_mass": float})}


def record_fault(record: Any) -> str:
    """The fault of a job's record in words; empty where frames can be made from it."""
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
    if missing := [name for name in DIAGNOSTICS if name not in record["diagnostics"]]:
        return f"its diagnostics lack {missing[0]}"
    columns = set(COLUMNS["truth"]) - {"setting", "method", "seed"}
    if not all(isinstance(row, dict) and columns <= set(row) for row in record["truth"]):
        return "its truth lacks columns"
    for name, reading in record.get("reading", {}).items():
        expected = set(COLUMNS.get(name, ())) - {"setting", "method"}
        if not expected or not isinstance(reading, dict) or not expected <= set(reading):
            return f"its reading of {brief(name)} lacks columns"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def read_frame(name: str, path: Path) -> pd.DataFrame:
    """A frame of a Study from its CSV; the column ``trust`` of older files is read as ``label_weight``.

    Raises:
        InputError: the file is cut off, has other columns, or text in a column of numbers.
    """
    options: dict[str, Any] = {"dtype": dict.fromkeys(TEXT_COLUMNS, str), "keep_default_na": False}
    numbers = ("trust", "label_weight", "negative_mass", "validation", "auroc")
    try:
        frame = pd.read_csv(path, na_values={column: [""] for column in numbers}, **options)
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise InputError(f"{path} is damaged: {one_line(str(error), 200)}") from error
    expected = {"results": RESULTS, "diagnostics": ("setting", "method", "seed", *DIAGNOSTICS)} | COLUMNS
    if "label_weight" in expected[name]:
        frame = current_columns(frame)
    if missing := [column for column in expected[name] if column not in frame]:
        raise InputError(f"{path} is damaged: it has no column {missing[0]!r}, only {', '.join(map(str, frame))}")
    for column in (each for each in expected[name] if each not in (*TEXT_COLUMNS, *BOOL_COLUMNS)):
        if len(frame) and not pd.api.types.is_numeric_dtype(frame[column]):
            raise InputError(f"{path} is damaged: its column {column!r} holds text, numbers are needed")
    return frame


def check_results(results: pd.DataFrame, config: Mapping[str, Any], path: Path) -> None:
    """Check that results hold known settings and methods, and as many finite scores for every seed.

    Raises:
        InputError: they do not.
    """
    if wrong := [name for name in ("name", "better", "note") if not isinstance(config["metric"].get(name), str)]:
        raise InputError(f"{path.with_name('config.json')} is damaged: metric.{wrong[0]} is not there")
    for name, configured in (("setting", config["settings"]), ("method", config["methods"])):
        if unknown := sorted(set(results[name]) - set(configured) - {"base"}):
            raise InputError(f"{path} is damaged: its {name} {brief(unknown[0])} is not in config.json")
    if not len(results) or not np.isfinite(results["score"]).all():
        raise InputError(f"{path} is damaged: it holds no scores, or some that are not finite")
    for setting, cells in results.groupby("setting"):
        counts = cells.groupby(["method", "seed"])["item"].agg(["size", "nunique"])
        if counts.to_numpy().min() != counts.to_numpy().max():
            short: Any = counts["size"].idxmin()
            raise InputError(
                f"{path} is damaged: {setting}: {short[0]} at seed {short[1]} has missing or repeated items"
            )


def ordered(frame: pd.DataFrame, config: Mapping[str, Any]) -> pd.DataFrame:
    """The frame sorted by those of setting, method, seed and item that it has, in the configuration's order."""
    ranks = {name: {each: rank for rank, each in enumerate(config[name + "s"])} for name in ("setting", "method")}
    keys = [name for name in ("setting", "method", "seed", "item") if name in frame]
    return frame.sort_values(
        keys, kind="stable", ignore_index=True, key=lambda c: c.map(ranks[c.name]) if c.name in ranks else c
    )


def _rates(setting: str, method: str, choice: Any) -> list[dict[str, Any]]:
    """A row per recipe and learning rate that was tried; one row where there was no search."""
    chosen = (choice.recipe.spec, choice.learning_rate)
    means = {(s, float(rate)): float(np.mean(v)) for s, rates in choice.scores.items() for rate, v in rates.items()}
    fixed = {"setting": setting, "method": method, "origin": choice.origin}
    return [
        {**fixed, "recipe": s, "learning_rate": rate, "validation": mean, "chosen": (s, rate) == chosen}
        | {"at_edge": choice.at_edge and (s, rate) == chosen}
        for (s, rate), mean in (means or {chosen: np.nan}).items()
    ]


def _frame(name: str, parts: list[Any]) -> pd.DataFrame:
    if not parts:
        return pd.DataFrame(columns=list(COLUMNS.get(name, ())))
    frame = pd.concat(parts, ignore_index=True) if isinstance(parts[0], pd.DataFrame) else pd.DataFrame(parts)
    return frame[list(COLUMNS[name])] if name in COLUMNS else frame
