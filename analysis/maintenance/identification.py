"""Identification benchmark: ``python -m qlens.analysis.maintenance.identification`` writes its table.

Each method, at its defaults, presets, bounds of its parameters and random parameters, is shown to the lens as an anonymous
loss function. The verdict is "itself", "an equal" (another method with the same gradient on the probes, up to a factor), or
"unknown".
"""

import argparse
import math
import time
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from rich.progress import track

from qlens.analysis.table_formats import markdown_table
from qlens.core.autograd import gradient
from qlens.core.errors import InputError
from qlens.core.probes import probes
from qlens.lens.identify import matching, parameter_search
from qlens.registry import Variant, methods, params, resolve
from qlens.registry.method import Method
from qlens.registry.params import Between

DRAWS = 3
NO_GRADIENT = 1e-9  # largest gradient that counts as zero


def random_variants(method: Method, number: int = DRAWS) -> list[Variant]:
    """The method at random parameters, each at its default with probability 1/2; deterministic."""
    draw = np.random.default_rng([ord(letter) for letter in method.name])
    defaults, types = params.defaults(method.fn), params.hints(method.fn)
    variants = []
    for _ in range(number if defaults else 0):
        values = {
            name: _value(types.get(name, Any), value, draw) for name, value in defaults.items() if draw.random() < 0.5
        }
        variants.append(method.variant(**values))
    return variants


def _value(hint: Any, default: Any, draw: np.random.Generator) -> Any:
    """A random value within an annotation, numbers to two digits."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        (between,) = [mark for mark in inner if isinstance(mark, Between)]
        low, high = max(between.low, -2.0), min(between.high, 4.0)
        if inner[0] is int:
            return int(draw.integers(max(2, int(low)), 20))
        return round(low + (high - low) * (0.02 + 0.96 * draw.random()), 2)
    if origin is Literal:
        return inner[int(draw.integers(len(inner)))]
    if isinstance(default, bool):
        return bool(draw.random() < 0.5)
    if isinstance(default, float):
        return round(float(2 * draw.random()), 2)
    return default


def identify(variant: Variant) -> dict[str, Any]:
    """The verdict of the lens on a method that is shown as a function of tokens."""
    tokens, start = probes(), time.perf_counter()
    grad = gradient(resolve(lambda tokens: variant.loss(tokens)).loss, tokens)
    row: dict[str, Any] = {"method": variant.name, "shown": variant.spec}
    if not math.isfinite(float(grad.norm())) or float(grad.abs().max()) < NO_GRADIENT:
        return row | {"verdict": "no gradient", "found": "", "relation": "", "seconds": time.perf_counter() - start}
    matches = [m for m in matching.nearest(grad, tokens) if m.same]
    matches = matches or parameter_search.search(grad, tokens)
    own = [match for match in matches if params.parse(match.spec)[0] == variant.name]
    best = (own or matches or [None])[0]
    verdict = "itself" if own else "an equal" if matches else "unknown"
    match = {"verdict": verdict, "found": best.spec if best else "", "relation": best.relation if best else ""}
    return row | match | {"factor": best.factor if best else math.nan, "seconds": time.perf_counter() - start}


def roundtrip(draws: int = DRAWS, names: tuple[str, ...] = ()) -> pd.DataFrame:
    """A row per method and parameter point."""
    rows = []
    chosen = [method for name, method in methods().items() if not names or name in names]
    for method in track(chosen, description="round trip"):
        points = [*matching.points(method), *random_variants(method, draws)]
        for variant in {variant.spec: variant for variant in points}.values():
            try:
                rows.append(identify(variant))
            except InputError:  # an invalid combination of parameters
                continue
    return pd.DataFrame(rows)


def report(table: pd.DataFrame, command: str) -> str:
    """The confusion table in Markdown, and every point that was not identified as itself."""
    counts = pd.crosstab(table["method"], table["verdict"])
    total = counts.sum()
    lines = ["# Identification of every method from its loss alone", "", f"    {command}", ""]
    lines += [", ".join(f"{count} {verdict}" for verdict, count in total.items()) + f", of {len(table)} points.", ""]
    columns = [name for name in ("itself", "an equal", "unknown", "no gradient") if name in counts]
    lines += [markdown_table(counts[columns].reset_index())]
    confused = table[table["verdict"].isin(["an equal", "unknown"])]
    lines += ["", "| shown | identified as |", "| --- | --- |"]
    lines += [f"| `{row.shown}` | {f'`{row.found}`' if row.found else 'nothing'} |" for row in confused.itertuples()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Command line: write roundtrip.csv and roundtrip.md."""
    parser = argparse.ArgumentParser(prog="python -m qlens.analysis.maintenance.identification", description=__doc__)
    parser.add_argument("--draws", type=int, default=DRAWS, help="random points per method")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args(argv)
    table = roundtrip(options.draws)
    table.drop(columns="seconds").to_csv(options.out / "roundtrip.csv", index=False, float_format="%.6g")
    text = report(table, f"python -m qlens.analysis.maintenance.identification --draws {options.draws}")
    (options.out / "roundtrip.md").write_text(text)
    print(text.split("\n\n")[2], f"Slowest: {table['seconds'].max():.1f} s; all: {table['seconds'].sum():.0f} s.")


if __name__ == "__main__":
    main()
