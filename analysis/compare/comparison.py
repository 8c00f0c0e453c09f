"""The main job: train methods side by side under equal conditions, and keep what came out as a study."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlens.analysis.compare.config import (
    Rows,
    Settled,
    check_needs,
    configuration,
    lab_sources,
    own_source,
    portable,
    seeds_of,
    settle_all,
)
from qlens.analysis.compare.environments import Lab, Real, Source, open_ground
from qlens.analysis.compare.jobs import FAILED, Job, Task, run_all, slug
from qlens.analysis.compare.learning_rates import Choice, chosen, gathered, trials
from qlens.analysis.compare.recipes import DEFAULT, Method, recipes
from qlens.analysis.compare.run_folder import claimed, default_folder
from qlens.core.errors import InputError, brief
from qlens.core.files import from_here, make_folder, user_path
from qlens.core.probes import probes
from qlens.lab import Setting, build, cache

if TYPE_CHECKING:
    from qlens.analysis.study.study import Study  # which reads compare's recipes and run folders

MOST = 10**9  # steps or jobs


@from_here()
def compare(
    variants: Method | Sequence[Method] | None = None,
    *,
    settings: str | Setting | Sequence[str | Setting] = ("strong-prior", "weak-prior"),
    seeds: int | Sequence[int] = 3,
    steps: int | None = None,
    learning_rate: float | None = None,
    lr_grid: bool = False,
    model: str | Path | None = None,
    teacher: str | Path | None = None,
    data: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    out: str | Path | None = None,
    save: bool = False,
    jobs: int | None = None,
    progress: bool = True,
) -> "Study":
    """Train methods side by side: same start, batches and steps, each at its learning rate from one grid by one rule.

    In the lab, each method is trained on every setting with every seed and scored by avg@k on the test problems; its
    rate was chosen beforehand on the validation problems, and is recorded with the lab. A method without a record is
    trained at sft's rate, or with ``lr_grid`` at the one that the same search finds for it. With ``model`` and ``data``,
    everything is trained on your rows at one rate; the score is then the NLL of held-out rows, per row: a diagnostic
    (SFT's own objective), not a ranking. ``base``, the untouched start, always comes first.

    Every finished job is a file in the run folder, so that the same call goes on where it was stopped. A job that fails
    leaves its traceback in the folder, under ``failed``; the others go on, and the same call tries it again.

    Args:
        variants: Variants, specs or loss functions, names of controls, and the groups "default" and "controls"; by
            default base and six methods.
        settings: the lab's, by name ("all": every one), or Settings of your own; not used with ``model``.
        seeds: how many (0, 1, ...), or which; they choose batches and the samples that are scored.
        steps: of training; by default the setting's, 100 on your own model (batches of 16).
        learning_rate: one for all, instead of the chosen ones; on your own model 5e-5 by default, or 1e-3 below 10 M
            parameters.
        lr_grid: search for the rates of what is not recorded: your own losses, other parameters, other settings.
        model, teacher: Hugging Face folders; ``data``: JSON Lines. Methods that pull toward a teacher need one.
        device, dtype: of your own model; one job at a time on a device other than the CPU.
        out: the run folder; by default one under ./runs, named by the configuration.
        save: whether to keep the trained models, under ``out/models``.
        jobs: parallel processes, one thread each; by default as many as there are cores.
        progress: whether to report on stderr.

    Raises:
        InputError: before anything runs, for whatever does not fit: unknown names, a missing teacher, unreadable models
            or data, or a run folder of another configuration or version, or in use by another process. Afterwards, if
            every single job failed.

    Source: Xie et al. 2026 (arXiv 2606.11189), whose comparison of targets this repeats in small.

    Example:
        >>> study = qlens.compare(["sft", "dft"], settings="strong-prior", seeds=3)        # doctest: +SKIP
        >>> print(study)                                                                   # doctest: +SKIP
    """
    for name, value in (("steps", steps), ("jobs", jobs)):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (whole and 1 <= value <= MOST):
            wanted = "at least 1" if whole and value < 1 else f"a whole number from 1 to {MOST}"
            raise InputError(f"{name} must be {wanted}, got {brief(value)}")
    number = isinstance(learning_rate, int | float) and not isinstance(learning_rate, bool)
    if learning_rate is not None and not (number and 0 < learning_rate < float("inf")):
        raise InputError(f"learning_rate must be positive and finite, got {brief(learning_rate)}")
    given = None if out is None else user_path(out, "out")
    rows, runs = recipes(DEFAULT if variants is None else variants), seeds_of(seeds)
    if model is None and data is None and teacher is None:
        sources = lab_sources(settings, steps)
    else:
        sources = own_source(model, data, teacher, steps=steps, device=device, dtype=dtype)
    check_needs(rows, sources)
    _refuse_exits(rows)
    portable(rows)
    settled = settle_all(rows, sources, learning_rate, lr_grid)
    config = configuration(rows, sources, settled, runs)
    folder = default_folder("lab" if model is None else sources[0].name, config) if given is None else given
    say = Console(stderr=True, quiet=not progress, highlight=False, markup=False, soft_wrap=True)
    processes = 1 if device != "cpu" else jobs
    if any(isinstance(source, Lab) for source in sources):
        make_folder(cache.root(), "cache folder (QLENS_CACHE)")  # before anything is written elsewhere
    with claimed(folder, config):
        _prepare(sources, progress, say)
        tried = _search(rows, sources, settled, folder, processes, progress)
        choices = _choices(rows, settled, tried)
        todo = _jobs(choices, sources, runs, folder, save)
        left = [job for job in todo if job.finished() is None]
        for job in left:
            if damage := job.damage():
                say.print(f"{job.path} is damaged and made again: {damage}")
        before = f", {len(todo) - len(left)} of them finished before" if len(left) < len(todo) else ""
        of = f"{len(sources)} x {len(rows)} methods x {len(runs)} seeds"
        say.print(f"{len(todo)} jobs ({of}){before}; run folder {folder}")
        try:
            run_all(left, processes, progress)
        except KeyboardInterrupt:
            say.print(f"Stopped. What is finished is kept in {folder}: the same call goes on from there.")
            raise
        failed = _failures([*tried, *todo])
        for line in failed:
            say.print(f"failed: {line}")
        noted = {"settings": {source.name: open_ground(source).noted for source in sources}, "failed": failed}
        records = [record for job in todo if (record := job.finished())]
        if not records:
            raise InputError(f"every job failed; the first: {failed[0]}; tracebacks are in {folder / FAILED}")
        from qlens.analysis.study.study import Study

        study = Study.from_records(config | {"noted": noted}, records, choices)
        study.save(folder)
    say.print(f"Report: {folder / 'report.html'}")
    return study


def _refuse_exits(rows: Rows) -> None:
    """Call every loss of the user's once on built-in tokens: one that ends the program would end a worker, or all of this.

    Other errors are left to the jobs, which see the real vocabulary and write them down.

    Raises:
        InputError: a loss calls ``sys.exit``.
    """
    variants = [recipe.variant for among in rows.values() for recipe in among if recipe.variant is not None]
    for variant in (each for each in variants if not each.method.fn.__module__.startswith("qlens.")):
        try:
            variant.loss(probes())
        except SystemExit as error:
            raise InputError(f"{variant.spec} ended the program by sys.exit({error.code!r})") from error
        except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError) as error:
            if isinstance(error.__cause__, SystemExit):  # wrapped on its way
                raise


def _prepare(sources: Sequence[Source], progress: bool, say: Console) -> None:
    """Build the worlds, open everything once, and say what is left out."""
    build([source.setting for source in sources if isinstance(source, Lab)], progress)
    for source in sources:
        noted = open_ground(source).noted
        if matched := noted.get("vocabulary"):
            say.print(f"{source.name}: {matched}")
        if ignored := noted.get("ignored keys"):
            say.print(f"{source.name}: keys that are ignored: {ignored}")
        if dropped := noted.get("dropped"):
            of = f"{noted['rows']} rows exceed the context of {noted['context']} tokens"
            say.print(f"{source.name}: {dropped} of {of}: dropped")


def _search(
    rows: Rows, sources: Sequence[Source], settled: Settled, folder: Path, processes: int | None, progress: bool
) -> list[Any]:
    """Run the trials that some choices wait for."""
    places = {source.name: source for source in sources}
    waiting = {place: found for place, found in settled.items() if not isinstance(found, Choice)}
    tried = [
        trial
        for (setting, method), rates in waiting.items()
        for trial in trials(places[setting], method, rows[method], rates, folder)
    ]
    run_all([trial for trial in tried if trial.finished() is None], processes, progress, "searching learning rates")
    return tried


def _choices(rows: Rows, settled: Settled, tried: Sequence[Any]) -> dict[tuple[str, str], Choice]:
    """All choices, those that waited for trials included; none where every rate failed."""
    found = {place: choice for place, choice in settled.items() if isinstance(choice, Choice)}
    for setting, method in (place for place in settled if place not in found):
        mine = [trial for trial in tried if (trial.source.name, trial.method) == (setting, method)]
        if scores := gathered(mine):
            found[setting, method] = chosen(rows[method], scores, "search")
    return {place: found[place] for place in settled if place in found}


def _jobs(
    choices: Mapping[tuple[str, str], Choice], sources: Sequence[Source], seeds: Sequence[int], folder: Path, save: bool
) -> list[Job]:
    places, made = {source.name: source for source in sources}, []
    for seed in seeds:
        for (setting, method), choice in choices.items():
            source = places[setting]
            kept = f"{slug(method)}-{seed}" if isinstance(source, Real) else f"{setting}-{slug(method)}-{seed}"
            made.append(
                Job(
                    folder=folder,
                    source=source,
                    method=method,
                    recipe=choice.recipe,
                    learning_rate=choice.learning_rate,
                    seed=seed,
                    reads=seed == seeds[0],
                    keep=folder / "models" / kept if save and choice.recipe.variant is not None else None,
                )
            )
    return made


def _failures(tasks: Sequence[Task]) -> list[str]:
    """A line for every task that failed: where its traceback is, and how that ends."""
    lines = []
    for task in tasks:
        if task.trace.is_file():
            last = task.trace.read_text(encoding="utf-8").strip().splitlines()[-1]
            lines.append(
                f"{task.method} in {task.source.name} at seed {task.seed}: {last} ({FAILED}/{task.trace.name})"
            )
    return lines
