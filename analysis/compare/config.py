"""Configuration of a comparison: arguments checked before anything runs, and everything that the results follow from."""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import cloudpickle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.analysis.compare.environments import LabSource
from qlens.analysis.compare.learning_rates import RULE, SEEDS, Choice, settle
from qlens.analysis.compare.recipes import Recipe
from qlens.analysis.compare.run_folder import code, versions
from qlens.analysis.compare.stored_models import stored
from qlens.analysis.compare.user_source import Source, UserSource, digest
from qlens.core.errors import InputError, UnknownName, brief
from qlens.data.collator import COLUMNS
from qlens.lab import SETTINGS, Setting
from qlens.registry import Variant

SOURCES = ("teacher", "reference", "old", "second", "sequence", "negatives")  # fields that a comparison can provide
ALL = "all"
MOST_SEEDS = 10_000

Rows = Mapping[str, Sequence[Recipe]]
Settled = dict[tuple[str, str], Choice | tuple[float, ...]]
"""By setting and method: the choice, or the rates to search first."""


def seeds_of(seeds: int | Sequence[int]) -> list[int]:
    """The seeds 0 .. n - 1 of a number n; or the seeds themselves.

    Raises:
        InputError: no seeds, repeated ones, or values that are no seeds.
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
    """Lab sources of settings by name, "all" or ``Setting``.

    Raises:
        InputError: no settings, repeated ones, or an unknown name.
    """
    listed: list[Any] = (
        list(settings) if isinstance(settings, Iterable) and not isinstance(settings, str) else [settings]
    )
    if wrong := [each for each in listed if not isinstance(each, str | Setting)]:
        raise InputError(f"settings must be names or Settings, got {brief(wrong[0])}")
    sources: list[Source] = []
    for each in [name for value in listed for name in (SETTINGS if value == ALL else (value,))]:
        if isinstance(each, str) and each not in SETTINGS:
            raise UnknownName.among("setting", each, [*SETTINGS, ALL])
        sources.append(LabSource(SETTINGS[each] if isinstance(each, str) else each, steps))
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise InputError(f"settings must be at least one, each with a name of its own, got {names}")
    return sources


def user_source(
    model: str | Path | PreTrainedModel | None,
    data: str | Path | None,
    teacher: str | Path | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    **options: Any,
) -> list[Source]:
    """The source of the user's model, teacher and data; modules are saved to the cache folder first.

    Raises:
        InputError: model or data is missing, or a module has no tokenizer.
    """
    if model is None or data is None:
        raise InputError("a comparison on your own model needs both model and data (a folder and a data file)")
    folders = [each if each is None else stored(each, name, tokenizer) for name, each in
               (("model", model), ("teacher", teacher))]  # fmt: skip
    return [UserSource.of(str(folders[0]), str(data), folders[1], **options)]


def check_needs(rows: Rows, sources: Sequence[Source]) -> None:
    """Check that every recipe gets the fields that it needs.

    Raises:
        InputError: a field that a comparison cannot provide, or no teacher for a method that needs one.
    """
    without_teacher = []
    for name, row in rows.items():
        needs = {need for recipe in row if recipe.variant is not None for need in recipe.variant.needs}
        if unknown := sorted(need for need in needs - set(SOURCES) if not all(need in s.columns for s in sources)):
            where = "a comparison" if unknown[0] not in COLUMNS else f"data without a column {unknown[0]!r}"
            raise InputError(f"{name} needs {unknown[0]!r}, which {where} cannot provide")
        teacher = any(recipe.guide == "teacher" and "teacher" in needs or recipe.equal_compute for recipe in row)
        without_teacher += [name] * teacher
    if without_teacher and not all(source.has_teacher for source in sources):
        raise InputError(
            f"{', '.join(without_teacher)} need a teacher: give teacher=DIR (--teacher), or leave them out of variants"
        )


def settle_all(rows: Rows, sources: Iterable[Source], learning_rate: float | None, lr_grid: bool) -> Settled:
    """Recipe and learning rate of every method in every setting, or the rates to search first.

    Raises:
        InputError: ``lr_grid`` on a user's model, or a control without a record and without ``lr_grid``.
    """
    if lr_grid and any(isinstance(source, UserSource) for source in sources):
        raise InputError(
            "lr_grid works in the lab only: on your own data the only score is held-out NLL, SFT's own objective, so that a "
            "search by it would favour SFT; give learning_rate"
        )
    return {
        (source.name, name): settle(source, name, row, learning_rate, lr_grid)
        for source in sources
        for name, row in rows.items()
    }


def configuration(
    rows: Rows, sources: Sequence[Source], settled: Mapping[tuple[str, str], Any], seeds: Sequence[int]
) -> dict[str, Any]:
    """All inputs of the results, as JSON."""
    metrics = [source.metric for source in sources]
    metric = metrics[0] if all(each == metrics[0] for each in metrics) else metrics[0] | {"name": "avg@k"}
    rates: dict[str, dict[str, Any]] = {source.name: {} for source in sources}
    for (setting, method), choice in settled.items():
        search = {"origin": "search", "rates": choice, "seeds": SEEDS, "rule": RULE}
        rates[setting][method] = choice.to_dict() if isinstance(choice, Choice) else search
    files = _loss_files(rows) | {file: value for s in sources if isinstance(s, UserSource) for file, value in s.files}
    config = {
        "versions": versions(),
        "code": code(),
        **({"files": files} if files else {}),
        "methods": {name: _code(row) for name, row in rows.items()},
        "settings": {source.name: source.identity() for source in sources},
        "rates": rates,
        "seeds": list(seeds),
        "metric": metric,
    }
    return json.loads(json.dumps(config))


def pickle_by_value(rows: Rows) -> None:
    """Let losses of a FILE.py be pickled with their code: worker processes cannot import it."""
    for variant in [recipe.variant for row in rows.values() for recipe in row if recipe.variant is not None]:
        module = sys.modules.get(variant.method.fn.__module__)
        if module is not None and module.__name__.startswith("qlens_user_"):
            cloudpickle.register_pickle_by_value(module)


def _code(row: Sequence[Recipe]) -> list[str]:
    """The recipes of a row, each with a digest of its code."""
    return [f"{each.spec}, {_origin(each.variant)}" for each in row if each.variant is not None]


def _origin(variant: Variant) -> str:
    module = sys.modules[variant.method.fn.__module__]
    if module.__name__.startswith("qlens."):
        return "built in"  # part of the digest of qlens' code
    if module.__name__.startswith("qlens_user_"):
        return f"code of {Path(str(module.__file__)).name}"  # one of the files
    source = cloudpickle.dumps(variant)  # of a notebook, closure included
    return f"code {hashlib.sha256(source).hexdigest()[:12]}"


def _loss_files(rows: Rows) -> dict[str, str]:
    """Digests of the users' loss files by path."""
    modules = [
        sys.modules[recipe.variant.method.fn.__module__]
        for row in rows.values()
        for recipe in row
        if recipe.variant is not None
    ]
    files = {Path(str(module.__file__)) for module in modules if module.__name__.startswith("qlens_user_")}
    return {str(file): digest(file) for file in sorted(files)}
