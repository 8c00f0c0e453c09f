"""Simulate the coverage of intervals, tests and rank sets: ``python -m qlens.analysis.maintenance.simulate_intervals``."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import special

from qlens.analysis.study import stats
from qlens.analysis.table_formats import markdown_table

SEEDS, ITEMS = (3, 5, 10), (20, 100)
SETTINGS, METHODS, RANKED = 4, 6, 6
"""The family of tests is METHODS against one reference in each of SETTINGS; RANKED methods are ranked."""

FIGURES = {
    "mean": "95 % interval covers the mean",
    "difference": "95 % interval covers the difference",
    "type I": "true null rejected at .05",
    "family": f"any of {SETTINGS * METHODS} true nulls, Holm at .05",
    "ranks apart": f"95 % rank sets of {RANKED} cover, means apart",
    "ranks close": f"95 % rank sets of {RANKED} cover, means close",
}


@dataclass(frozen=True, kw_only=True)
class Normal:
    """Scores with normal effects, by their standard deviations.

    Args:
        seed: of a method's seeds; ``error``: of its cells.
        item: of items, shared by the methods; ``own``: of the interaction of items and methods.
        large_step, small_step: steps between the means of methods to rank.
    """

    seed: float
    item: float
    own: float
    error: float = 0.15
    large_step: float = 0.08
    small_step: float = 0.004

    def __str__(self) -> str:
        return f"normal: seed {self.seed:g}, item {self.item:g}, own {self.own:g}, error {self.error:g}"

    def means(self, shifts: np.ndarray) -> np.ndarray:
        """Expected scores of methods with these shifts on a new item with a new seed."""
        return shifts

    def draw(self, rng: np.random.Generator, size: int, shifts: np.ndarray, seeds: int, items: int) -> np.ndarray:
        """Tables (size, methods, seeds, items)."""
        x = effects(rng, (size, len(shifts), seeds, items), self.seed, self.item, self.own, self.error)
        return x + shifts[:, None, None]


@dataclass(frozen=True, kw_only=True)
class BetaBinomial:
    """avg@k scores: Beta distributed item difficulties, all other effects normal in the logit, as in ``Normal``.

    Args:
        a, b: of the Beta distribution.
        k: samples per item and seed.
        seed, own, cell: standard deviations of seeds, of items x methods, of items x seeds.
        large_step, small_step: steps in the logit between methods to rank.
    """

    a: float
    b: float
    k: int = 8
    seed: float = 0.2
    own: float = 1.0
    cell: float = 0.3
    large_step: float = 0.5
    small_step: float = 0.02

    def __str__(self) -> str:
        effects = f"logit seed {self.seed:g}, own {self.own:g}, seed x item {self.cell:g}"
        return f"avg@{self.k}: items Beta({self.a:g}, {self.b:g}), {effects}"

    def means(self, shifts: np.ndarray) -> np.ndarray:
        """Expected scores of methods with these shifts, by quadrature over items and effects."""
        items = special.logit(special.betaincinv(self.a, self.b, (np.arange(1000) + 0.5) / 1000))
        nodes, weights = np.polynomial.hermite_e.hermegauss(40)
        spread = np.sqrt(self.seed**2 + self.own**2 + self.cell**2)
        by_node = special.expit(shifts[:, None, None] + items[:, None] + spread * nodes).mean(1)
        return by_node @ weights / weights.sum()

    def draw(self, rng: np.random.Generator, size: int, shifts: np.ndarray, seeds: int, items: int) -> np.ndarray:
        """Tables (size, methods, seeds, items)."""
        x = effects(rng, (size, len(shifts), seeds, items), self.seed, 0.0, self.own, self.cell)
        x += shifts[:, None, None] + special.logit(rng.beta(self.a, self.b, (size, 1, 1, items)))
        return rng.binomial(self.k, special.expit(x)) / self.k


CASES = [
    *(Normal(seed=seed, item=item, own=own) for seed in (0, 0.02, 0.05, 0.1) for item, own in ((0.25, 0), (0.15, 0.2))),
    BetaBinomial(a=1.5, b=1),
    BetaBinomial(a=0.5, b=4),
]


def effects(
    rng: np.random.Generator, shape: tuple[int, ...], seed: float, item: float, own: float, cell: float
) -> np.ndarray:
    """Normal effects with these standard deviations, (size, methods, seeds, items)."""
    size, methods, seeds, items = shape
    parts = ((size, methods, seeds, 1), seed), ((size, 1, 1, items), item), ((size, methods, 1, items), own)
    x = cell * rng.standard_normal(shape)
    for part, spread in parts:
        if spread:
            x += spread * rng.standard_normal(part)
    return x


def trial(
    case: Normal | BetaBinomial, rng: np.random.Generator, size: int, seeds: int, items: int
) -> dict[str, np.ndarray]:
    """Rate of each of FIGURES, (size,), in every repetition."""
    equal = np.zeros(METHODS + 1)
    null = case.draw(rng, size * SETTINGS, equal, seeds, items).reshape(size, SETTINGS, METHODS + 1, seeds, items)
    p = stats.p_value(*stats.fit(null[:, :, 1:] - null[:, :, :1])).reshape(size, -1)
    rates = {
        "mean": _covered(null[:, :, 0], case.means(equal)[0]).mean(-1),
        "type I": (p < 0.05).mean(-1),
        "family": (stats.adjusted(p) < 0.05).any(-1),
    }
    for name, step in (("apart", case.large_step), ("close", case.small_step)):
        shifts = step * (np.arange(RANKED) - (RANKED - 1) / 2)
        x, means = case.draw(rng, size, shifts, seeds, items), case.means(shifts)
        if name == "apart":
            rates["difference"] = _covered(x[:, 1:] - x[:, :1], means[1:] - means[0]).mean(-1)
        _, best, worst = stats.ranked(x, 0.95)
        true = np.arange(RANKED, 0, -1)
        rates[f"ranks {name}"] = ((best <= true) & (true <= worst)).all(-1)
    return rates


def _covered(x: np.ndarray, means: np.ndarray) -> np.ndarray:
    mean, variance, df = stats.fit(x)
    return np.abs(mean - means) <= stats.half_width(variance, df, 0.95)


def measure(case: Normal | BetaBinomial, seeds: int, items: int, repeats: int, seed: int = 0) -> dict[str, float]:
    """Mean rate of each of FIGURES."""
    rng = np.random.default_rng([seed, seeds, items])
    batch = max(1, 20_000 // (seeds * items))
    sizes = [min(batch, repeats - start) for start in range(0, repeats, batch)]
    rates = pd.concat([pd.DataFrame(trial(case, rng, size, seeds, items)) for size in sizes])
    return {name: float(rates[name].mean()) for name in FIGURES}


def simulate(repeats: int) -> pd.DataFrame:
    """A row per figure, case and size: figure, seeds, items, case, repeats, rate."""
    cells = [(case, seeds, items) for case in CASES for items in ITEMS for seeds in SEEDS]
    rows = []
    for case, seeds, items in track(cells, "simulating"):
        rates = measure(case, seeds, items, repeats, seed=CASES.index(case))
        key = {"seeds": seeds, "items": items, "case": str(case), "repeats": repeats}
        rows += [{"figure": figure, **key, "rate": round(rate, 5)} for figure, rate in rates.items()]
    return pd.DataFrame(rows)


def ranges(frame: pd.DataFrame, figures: tuple[str, ...]) -> list[tuple[int, int, int]]:
    """Lowest and highest rate of these figures in whole percent, with the number of seeds."""
    by_seeds = frame[frame["figure"].isin(figures)].groupby("seeds")["rate"].agg(["min", "max"])
    return [(round(100 * low), round(100 * high), int(seeds)) for seeds, low, high in by_seeds.itertuples()]


def summary(frame: pd.DataFrame) -> list[dict[str, str]]:
    """A row per figure and number of items: range over the cases in percent, and the worst case."""
    rows = []
    for (figure, items), cells in frame.groupby(["figure", "items"], sort=False):
        is_error_rate = figure in ("type I", "family")
        worst = cells.loc[cells["rate"].idxmax() if is_error_rate else cells["rate"].idxmin()]
        by_seeds = (100 * cells.groupby("seeds")["rate"].agg(["min", "max"])).itertuples()
        row = {"in percent": FIGURES[figure], "aim": "5" if is_error_rate else "95", "items": str(items)}
        row |= {f"{seeds} seeds": f"{low:.1f} to {high:.1f}" for seeds, low, high in by_seeds}
        rows.append(row | {"worst": f"{worst['seeds']} seeds, {worst['case']}"})
    return rows


def markdown(frame: pd.DataFrame) -> str:
    """The summary in Markdown."""
    rows, repeats = summary(frame), frame["repeats"].iloc[0]
    lines = [
        "# Coverage of intervals, tests and rank sets",
        "",
        f"    python -m qlens.analysis.maintenance.simulate_intervals --repeats {repeats}",
        "",
        f"Lowest to highest rate over the cases below, {repeats} repetitions each (standard error at 95 or 5 %: at most "
        f"{100 * np.sqrt(0.95 * 0.05 / repeats):.2f}). Every case and size: coverage.csv.",
        "",
        markdown_table(pd.DataFrame(rows)),
        "",
        "Cases, by standard deviations; own is the interaction of items and methods:",
        "",
        *(f"- {case}" for case in frame["case"].unique()),
    ]
    return "\n".join(lines) + "\n"


def show(frame: pd.DataFrame) -> None:
    """Print the summary."""
    rows = [{name: cell for name, cell in row.items() if name != "worst"} for row in summary(frame)]
    table = Table(title=f"lowest to highest rate over {frame['case'].nunique()} cases")
    for name in rows[0]:
        table.add_column(name, no_wrap=name != "in percent")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    """Command line: write coverage.csv and coverage.md, and print the summary."""
    parser = argparse.ArgumentParser(
        prog="python -m qlens.analysis.maintenance.simulate_intervals", description=__doc__
    )
    parser.add_argument("--repeats", type=int, default=4000, help="repetitions of every case and size (4000)")
    parser.add_argument("--out", type=Path, default=Path("analysis/results"), help="folder (analysis/results)")
    options = parser.parse_args(argv)
    frame = simulate(options.repeats)
    options.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out / "coverage.csv", index=False)
    (options.out / "coverage.md").write_text(markdown(frame), encoding="utf-8")
    show(frame)


if __name__ == "__main__":
    main()
