"""What a comparison is going to do, settled and checked before anything runs, and written down as its configuration."""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import cloudpickle

from qlens.analysis.compare.environments import Lab, Real, Source, digest
from qlens.analysis.compare.learning_rates import RULE, SEEDS, Choice, settle
from qlens.analysis.compare.recipes import Recipe
from qlens.analysis.compare.run_folder import code, versions
from qlens.core.errors import InputError, UnknownName, brief
from qlens.data.collator import COLUMNS
from qlens.lab import SETTINGS, Setting
from qlens.registry import Variant

SOURCES = ("teacher", "reference", "old", "second", "sequence", "negatives")  # what a comparison can offer to methods
ALL = "all"
MOST_SEEDS = 10_000

Rows = Mapping[str, Sequence[Recipe]]
Settled = dict[tuple[str, str], Choice | tuple[float, ...]]
"""By setting and method: the choice, or the rates to be tried before it."""


def seeds_of(seeds: int | Sequence[int]) -> list[int]:
    """A number n as 0 .. n - 1; or the seeds themselves.

    Raises:
        InputError: none, doubles, or something that is no seed.
    """
    if isinstance(seeds, bool) or not isinstance(seeds, Integral | Sequence) or isinstance(seeds, str):
        raise InputError(f"seeds must be a number, or a list of seeds, got {brief(seeds)}")
    if isinstance(seeds, Integral) and not 1 <= int(seeds) <= MOST_SEEDS:
        raise InputError(f"seeds must be a number from 1 to {MOST_SEEDS}, or a list of seeds, got {brief(seeds)}")
    chosen: list[Any] = list(range(int(seeds))) if isinstance(seeds, Integral) else list(seeds)
    fits = all(isinstance(s, Integral) and not isinstance(s, bool) and 0 <= int(s) < 2**32 for s in chosen)
    if not chosen or not fits or len(set(chosen)) < len(chosen):
        raise InputError(f"seeds must be at least one, distinct, each from 0 to 2^32 - 1, got {brief(seeds)}")
    return [int(seed) for seed in chosen]


def lab_sources(settings: str | Setting | Sequence[str | Setting], steps: int | None) -> list[Source]:
    """The lab's settings, by name or one's own; "all" is all that have a name.

    Raises:
        InputError: none, doubles, or an unknown name.
    """
    listed: list[Any] = (
        list(settings) if isinstance(settings, Iterable) and not isinstance(settings, str) else [settings]
    )
    if strange := [each for each in listed if not isinstance(each, str | Setting)]:
        raise InputError(f"settings must be names or Settings, got {brief(strange[0])}")
    found: list[Source] = []
    for each in [name for given in listed for name in (SETTINGS if given == ALL else (given,))]:
        if isinstance(each, str) and each not in SETTINGS:
            raise UnknownName.among("setting", each, [*SETTINGS, ALL])
        found.append(Lab(SETTINGS[each] if isinstance(each, str) else each, steps))
    names = [source.name for source in found]
    if not names or len(set(names)) < len(names):
        raise InputError(f"settings must be at least one, each with a name of its own, got {names}")
    return found


def own_source(
    model: str | Path | None, data: str | Path | None, teacher: str | Path | None, **given: Any
) -> list[Source]:
    """The user's own model, teacher and data.

    Raises:
        InputError: model or data is missing.
    """
    if model is None or data is None:
        raise InputError("a comparison on your own model needs both model and data (a folder and a JSON Lines file)")
    return [Real.of(str(model), str(data), None if teacher is None else str(teacher), **given)]


def check_needs(rows: Rows, sources: Sequence[Source]) -> None:
    """Whether every recipe can be given what it needs.

    Raises:
        InputError: a field that a comparison cannot provide, or a teacher where there is none.
    """
    lacking = []
    for name, among in rows.items():
        needs = {need for recipe in among if recipe.variant is not None for need in recipe.variant.needs}
        if unknown := sorted(need for need in needs - set(SOURCES) if not all(need in s.columns for s in sources)):
            where = "a comparison" if unknown[0] not in COLUMNS else f"data without a column {unknown[0]!r}"
            raise InputError(f"{name} needs {unknown[0]!r}, which {where} cannot provide")
        own = any(recipe.guide == "teacher" and "teacher" in needs or recipe.equal_compute for recipe in among)
        lacking += [name] * own
    if lacking and not all(source.has_teacher for source in sources):
        raise InputError(
            f"{', '.join(lacking)} need a teacher: give teacher=DIR (--teacher), or leave them out of variants"
        )


def settle_all(rows: Rows, sources: Iterable[Source], learning_rate: float | None, lr_grid: bool) -> Settled:
    """Every method's recipe and rate in every setting, as far as they can be known before a search.

    Raises:
        InputError: ``lr_grid`` on one's own model, or a control that nothing is recorded for without it.
    """
    if lr_grid and any(isinstance(source, Real) for source in sources):
        raise InputError(
            "lr_grid works in the lab only: on your own data the one score there is, held-out NLL, is SFT's own "
            "objective, so that searching by it would favour SFT; give learning_rate"
        )
    return {
        (source.name, name): settle(source, name, among, learning_rate, lr_grid)
        for source in sources
        for name, among in rows.items()
    }


def configuration(
    rows: Rows, sources: Sequence[Source], settled: Mapping[tuple[str, str], Any], seeds: Sequence[int]
) -> dict[str, Any]:
    """Everything that the results follow from, as JSON."""
    metrics = [source.metric for source in sources]
    metric = metrics[0] if all(each == metrics[0] for each in metrics) else metrics[0] | {"name": "avg@k"}
    rates: dict[str, dict[str, Any]] = {source.name: {} for source in sources}
    for (setting, method), found in settled.items():
        search = {"origin": "search", "rates": found, "seeds": SEEDS, "rule": RULE}
        rates[setting][method] = found.told() if isinstance(found, Choice) else search
    files = _loss_files(rows) | {file: found for s in sources if isinstance(s, Real) for file, found in s.files}
    config = {
        "versions": versions(),
        "code": code(),
        **({"files": files} if files else {}),
        "methods": {name: _code(among) for name, among in rows.items()},
        "settings": {source.name: source.identity() for source in sources},
        "rates": rates,
        "seeds": list(seeds),
        "metric": metric,
    }
    return json.loads(json.dumps(config))


def portable(rows: Rows) -> None:
    """See to it that losses of a FILE.py travel to other processes with their code: those cannot import it."""
    for variant in [recipe.variant for among in rows.values() for recipe in among if recipe.variant is not None]:
        module = sys.modules.get(variant.method.fn.__module__)
        if module is not None and module.__name__.startswith("qlens_user_"):
            cloudpickle.register_pickle_by_value(module)


def _code(among: Sequence[Recipe]) -> list[str]:
    """What tells one version of a row from another: its recipes, each with a digest of its code."""
    return [f"{each.spec}, {_origin(each.variant)}" for each in among if each.variant is not None]


def _origin(variant: Variant) -> str:
    module = sys.modules[variant.method.fn.__module__]
    if module.__name__.startswith("qlens."):
        return "built in"  # and so in the digest of qlens' code
    if module.__name__.startswith("qlens_user_"):
        return f"code of {Path(str(module.__file__)).name}"  # among the files
    source = cloudpickle.dumps(variant)  # of a notebook: with what the function has closed over
    return f"code {hashlib.sha256(source).hexdigest()[:12]}"


def _loss_files(rows: Rows) -> dict[str, str]:
    """Digests of the users' files that losses come from, by path."""
    modules = [
        sys.modules[recipe.variant.method.fn.__module__]
        for among in rows.values()
        for recipe in among
        if recipe.variant is not None
    ]
    files = {Path(str(module.__file__)) for module in modules if module.__name__.startswith("qlens_user_")}
    return {str(file): digest(file) for file in sorted(files)}
