"""The records of a comparison's jobs as frames: long tables in the configuration's order."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

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
