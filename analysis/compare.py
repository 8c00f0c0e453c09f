"""The main job: train methods side by side under equal conditions, and keep what came out as a study."""

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cloudpickle
from rich.console import Console

import qlens
from qlens.analysis.folder import claim, default_folder
from qlens.analysis.grounds import Lab, Real, Source, open_ground
from qlens.analysis.jobs import Job, run_all, slug
from qlens.analysis.study import Study
from qlens.errors import InputError, UnknownName
from qlens.lab import SETTINGS, Setting, build
from qlens.registry import Variant, resolve

BASE = "base"
DEFAULT = (BASE, "sft", "dft", "kd", "label_smoothing", "asft_anchored", "target_sft")
SOURCES = ("teacher", "reference")  # what a comparison can offer to methods
PACKAGES = ("qlens-sft", "torch", "transformers", "numpy", "scipy")

Method = Variant | str | Callable


def compare(
    variants: Method | Sequence[Method] | None = None,
    *,
    settings: str | Setting | Sequence[str | Setting] = ("strong-prior", "weak-prior"),
    seeds: int | Sequence[int] = 3,
    steps: int | None = None,
    learning_rate: float | None = None,
    model: str | Path | None = None,
    teacher: str | Path | None = None,
    data: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    out: str | Path | None = None,
    save: bool = False,
    jobs: int | None = None,
    progress: bool = True,
) -> Study:
    """Train methods side by side: same start, batches, steps and learning rate; only the loss differs.

    In the lab, each method is trained on every setting with every seed and scored by avg@k on the test problems. With
    ``model`` and ``data``, it is trained on your rows; the score is then the NLL of held-out rows, per row: a diagnostic
    (SFT's own objective), not a ranking. ``base``, the untouched start, always comes first. Every finished job is a
    file in the run folder, so that the same call goes on where it was stopped.

    Args:
        variants: Variants, specs or loss functions; by default base and six methods.
        settings: the lab's, by name, or Settings of your own; not used with ``model``.
        seeds: how many (0, 1, ...), or which; they choose batches and the samples that are scored.
        steps: of training; by default the setting's, 100 on your own model (batches of 16).
        learning_rate: one for all; by default the setting's; on your own model 5e-5, or 1e-3 below 10 M parameters.
        model, teacher: Hugging Face folders; ``data``: JSON Lines. Methods that pull toward a teacher need one.
        device, dtype: of your own model; one job at a time on a device other than the CPU.
        out: the run folder; by default one under ./runs, named by the configuration.
        save: whether to keep the trained models, under ``out/models``.
        jobs: parallel processes, one thread each; by default as many as there are cores.
        progress: whether to report on stderr.

    Raises:
        InputError: before anything runs, for whatever does not fit: unknown names, a missing teacher, unreadable models
            or data, or a run folder of another configuration or version.

    Source: Xie et al. 2026 (arXiv 2606.11189), whose comparison of targets this repeats in small.

    Example:
        >>> study = qlens.compare(["sft", "dft"], settings="strong-prior", seeds=3)        # doctest: +SKIP
        >>> print(study)                                                                   # doctest: +SKIP
    """
    for name, value in (("steps", steps), ("jobs", jobs)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if learning_rate is not None and not learning_rate > 0:
        raise InputError(f"learning_rate must be positive, got {learning_rate}")
    methods, runs = _methods(DEFAULT if variants is None else variants), _seeds(seeds)
    given = {"steps": steps, "learning_rate": learning_rate}
    if model is None and data is None and teacher is None:
        sources = _lab(settings, given)
    elif model is None or data is None:
        raise InputError("a comparison on your own model needs both model and data (a folder and a JSON Lines file)")
    else:
        own = str(model), str(data), None if teacher is None else str(teacher)
        sources = [Real.of(*own, **given, device=device, dtype=dtype)]
    _check_needs(methods, sources)
    config = _config(methods, sources, runs)
    kind = "lab" if model is None else sources[0].name
    folder = Path(out) if out is not None else default_folder(kind, config)
    say = Console(stderr=True, quiet=not progress, highlight=False)
    claim(folder, config)
    build([source.setting for source in sources if isinstance(source, Lab)], progress)
    for source in sources:
        noted = open_ground(source).noted
        if dropped := noted.get("dropped"):
            of = f"{noted['rows']} rows exceed the context of {noted['context']} tokens"
            say.print(f"{source.name}: {dropped} of {of}: dropped")
    todo = _jobs(methods, sources, runs, folder, save)
    left = [job for job in todo if job.finished() is None]
    already = f", {len(todo) - len(left)} of them finished before" if len(left) < len(todo) else ""
    say.print(
        f"{len(todo)} jobs ({len(sources)} x {len(methods)} methods x {len(runs)} seeds){already}; run folder {folder}"
    )
    try:
        run_all(left, 1 if device != "cpu" else jobs, progress)
    except KeyboardInterrupt:
        say.print(f"Stopped. What has finished is kept in {folder}: the same call goes on from there.")
        raise
    config["noted"] = {"versions": _versions(), "settings": {s.name: open_ground(s).noted for s in sources}}
    study = Study.from_records(config, [record for job in todo if (record := job.finished())])
    study.save(folder)
    say.print(f"Report: {folder / 'report.html'}")
    return study


def _methods(variants: Method | Sequence[Method]) -> dict[str, Variant | None]:
    """The methods by the names they have in tables: ``base`` first, then as given."""
    one = isinstance(variants, str | Variant) or callable(variants)
    listed = [variants] if one else list(variants)
    methods: dict[str, Variant | None] = {BASE: None}
    for each in listed:
        if each == BASE:
            continue
        variant = resolve(each)
        name = each.strip() if isinstance(each, str) and ".py:" in each else variant.spec
        if name in methods:
            raise InputError(f"variants has {name!r} twice: every method needs a name of its own")
        methods[name] = variant
    return methods


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen) or not all(isinstance(s, int) and s >= 0 for s in chosen):
        raise InputError(f"seeds must be a number of at least 1, or distinct seeds of 0 and above, got {seeds!r}")
    return chosen


def _lab(settings: Any, given: Mapping[str, Any]) -> list[Source]:
    listed = [settings] if isinstance(settings, str | Setting) else list(settings)
    found = []
    for each in listed:
        if isinstance(each, str) and each not in SETTINGS:
            raise UnknownName.among("setting", each, SETTINGS)
        found.append(Lab(SETTINGS[each] if isinstance(each, str) else each, **given))
    names = [source.name for source in found]
    if not names or len(set(names)) < len(names):
        raise InputError(f"settings must be at least one, each with a name of its own, got {names}")
    return found


def _check_needs(methods: Mapping[str, Variant | None], sources: Iterable[Source]) -> None:
    needs = {name: variant.needs for name, variant in methods.items() if variant is not None}
    for name, wanted in needs.items():
        if unknown := [need for need in wanted if need not in SOURCES]:
            raise InputError(f"{name} needs {unknown[0]!r}, which a comparison cannot provide")
    lacking = [name for name, wanted in needs.items() if "teacher" in wanted]
    if lacking and not all(source.has_teacher for source in sources):
        raise InputError(
            f"{', '.join(lacking)} need a teacher: give teacher=DIR (--teacher), or leave them out of variants"
        )


def _config(methods: Mapping[str, Variant | None], sources: Sequence[Source], seeds: list[int]) -> dict[str, Any]:
    """Everything that the results follow from, as JSON."""
    metrics = [source.metric for source in sources]
    metric = metrics[0] if all(each == metrics[0] for each in metrics) else metrics[0] | {"name": "avg@k"}
    config = {
        "qlens": qlens.__version__,
        "methods": {name: _code(variant) for name, variant in methods.items()},
        "settings": {source.name: source.identity() for source in sources},
        "seeds": seeds,
        "metric": metric,
    }
    return json.loads(json.dumps(config))


def _built_in(variant: Variant) -> bool:
    """Whether every process that imports qlens has it."""
    return variant.method.fn.__module__.startswith("qlens.")


def _code(variant: Variant | None) -> str:
    """What tells one version of a user's loss from another; built-in methods go by qlens' own version."""
    if variant is None or _built_in(variant):
        return "built in"
    return "code " + hashlib.sha256(cloudpickle.dumps(_portable(variant))).hexdigest()[:12]


def _portable(variant: Variant) -> Variant:
    """A variant that travels to other processes with its code: they cannot import a notebook, or the module of a FILE.py."""
    module = sys.modules.get(variant.method.fn.__module__)
    if module is not None and module.__name__.startswith("qlens_user_"):
        cloudpickle.register_pickle_by_value(module)
    return Variant(variant.method, variant.params)


def _jobs(
    methods: Mapping[str, Variant | None], sources: Sequence[Source], seeds: Sequence[int], folder: Path, save: bool
) -> list[Job]:
    sent = {n: v if v is None else v.spec if _built_in(v) else _portable(v) for n, v in methods.items()}
    made = []
    for seed in seeds:
        for source in sources:
            for name, variant in sent.items():
                kept = f"{slug(name)}-{seed}" if isinstance(source, Real) else f"{source.name}-{slug(name)}-{seed}"
                keep = folder / "models" / kept if save and variant is not None else None
                made.append(Job(source, name, variant, seed, seed == seeds[0], folder, keep))
    return made


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
