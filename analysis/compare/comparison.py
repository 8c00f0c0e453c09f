"""Compare: train methods side by side under equal conditions; the result is a study."""

import tempfile
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.analysis.compare.config import (
    Rows,
    Settled,
    check_needs,
    configuration,
    lab_sources,
    pickle_by_value,
    seeds_of,
    settle_all,
    user_source,
)
from qlens.analysis.compare.environments import LabSource
from qlens.analysis.compare.jobs import FAILED, Job, Task, slug
from qlens.analysis.compare.learning_rates import Choice, chosen, gathered, trials
from qlens.analysis.compare.live_table import LiveTable
from qlens.analysis.compare.recipes import DEFAULT, Method, recipes
from qlens.analysis.compare.run_folder import default_folder, locked
from qlens.analysis.compare.schedule import in_turn, run_all
from qlens.analysis.compare.user_source import Source, UserSource
from qlens.core.errors import InputError, brief
from qlens.core.files import from_here, make_folder, user_path
from qlens.core.probes import probes
from qlens.core.progress import stderr, track
from qlens.lab import Setting, build, cache
from qlens.lab.building import constructions

if TYPE_CHECKING:
    from qlens.analysis.study.study import Study  # which imports the recipes and run folders of this package

LARGEST = 10**9  # steps or jobs


@from_here()
def compare(
    variants: Method | Sequence[Method] | None = None,
    *,
    settings: str | Setting | Sequence[str | Setting] = ("strong-prior", "weak-prior"),
    seeds: int | Sequence[int] = 3,
    steps: int | None = None,
    learning_rate: float | None = None,
    lr_grid: bool = False,
    model: str | Path | PreTrainedModel | None = None,
    teacher: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: str | Path | None = None,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    max_length: int | None = None,
    on_long: str | None = None,
    lora_rank: int | None = None,
    gradient_checkpointing: bool = False,
    chat_template: str | Path | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    on_bad: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    out: str | Path | None = None,
    save: bool = False,
    jobs: int | None = None,
    progress: bool = True,
) -> "Study":
    """Train methods side by side: the same start, batches and steps, and learning rates from one grid by one rule.

    In the lab, each method is trained on every setting with every seed and scored by avg@k on the test problems. Its
    learning rate was chosen on the validation problems and is recorded with the lab; a method without a record is trained
    at sft's rate, or with ``lr_grid`` at the best of the same search. With ``model`` and ``data``, everything is trained
    on your rows at one learning rate; the score is the NLL of held-out rows, a diagnostic (SFT's own objective), not a
    ranking. The first row, ``base``, is the starting model.

    Every finished job is a file in the run folder, so that the same call resumes an interrupted comparison. The traceback
    of a failed job is in the folder ``failed``; other jobs continue, and the same call tries it again.

    Args:
        variants: Variants, specs or loss functions, names of controls, and the groups "default" and "controls"; by
            default base and six methods.
        settings: settings of the lab, by name ("all": every one) or as ``Setting``; not used with ``model``.
        seeds: their number (0, 1, ...) or the seeds; they choose batches and the samples that are scored.
        steps: training steps; by default the setting's, 100 on your own model.
        learning_rate: one for all methods, instead of the chosen ones; on your own model by default 5e-5, 5e-4 with LoRA, or
            1e-3 below 10 M parameters.
        lr_grid: search the learning rates that are not recorded: of your losses, other parameters, other settings.
        model, teacher: Hugging Face folders, or transformers models, which are saved once to the cache folder. Methods
            with a teacher need one.
        tokenizer: of models that are not folders.
        data: a file, a folder, or NAME:SPLIT on the Hugging Face hub, as ``qlens.data.load_rows`` reads them.
        batch_size: rows of an optimizer step on your own model, by default 16.
        micro_batch_size: rows of a forward pass, a divisor of ``batch_size``; by default all of them.
        max_length: of a row, in tokens; by default what the models take.
        on_long: what becomes of longer rows: "drop" (the default), "truncate_left", "truncate_right" or "error"; they are
            counted.
        lora_rank: train adapters of this rank on all linear layers but the head, and no weights of the model; the reference is
            then the model without them.
        gradient_checkpointing: compute activations twice, to hold fewer of them.
        chat_template: a file with a chat template (jinja) that replaces the tokenizer's.
        prompt_column, completion_column: of your data, where their names do not say it (``qlens.encode``).
        on_bad: "drop" leaves out rows of your data that cannot be used, which are an error otherwise.
        device: of your own models; on one other than the CPU, one job runs at a time.
        dtype: of all products on your own model ("float32", "bfloat16", "float16"); trained weights are in float32.
        out: the run folder; by default one under ./runs, named by the configuration.
        save: whether to keep the trained models, in ``out/models``.
        jobs: parallel processes, one thread each; by default the number of cores.
        progress: whether to report on stderr.

    Returns:
        a study: ``print`` it, or use ``table()``, ``plot()``, ``to_latex()``; the run folder holds report.html.

    Raises:
        InputError: before anything runs, for arguments that do not fit: unknown names, a missing teacher, unreadable
            models or data, or a run folder of another configuration or version, or in use. Afterwards, if every job
            failed.

    Source: Xie et al. 2026 (arXiv 2606.11189), whose comparison of targets this repeats at small scale.

    Example:
        >>> study = qlens.compare(["sft", "dft"], settings="strong-prior", seeds=3)        # doctest: +SKIP
        >>> print(study)                                                                   # doctest: +SKIP
    """
    numbers = {"steps": steps, "jobs": jobs, "batch_size": batch_size, "micro_batch_size": micro_batch_size}
    for name, value in {**numbers, "max_length": max_length, "lora_rank": lora_rank}.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (whole and 1 <= value <= LARGEST):
            requirement = "at least 1" if whole and value < 1 else f"a whole number from 1 to {LARGEST}"
            raise InputError(f"{name} must be {requirement}, got {brief(value)}")
    number = isinstance(learning_rate, int | float) and not isinstance(learning_rate, bool)
    if learning_rate is not None and not (number and 0 < learning_rate < float("inf")):
        raise InputError(f"learning_rate must be positive and finite, got {brief(learning_rate)}")
    run_folder = None if out is None else user_path(out, "out")
    rows, runs = recipes(DEFAULT if variants is None else variants), seeds_of(seeds)
    own = {
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "max_length": max_length,
        "on_long": on_long,
        "lora_rank": lora_rank,
        "gradient_checkpointing": gradient_checkpointing or None,
        "chat_template": None if chat_template is None else str(chat_template),
        "prompt_column": prompt_column,
        "completion_column": completion_column,
        "on_bad": on_bad,
    }
    own = {name: value for name, value in own.items() if value is not None}
    if model is None and data is None and teacher is None:
        if own:
            raise InputError(f"{next(iter(own))} goes with model= and data=: the lab's settings have their own")
        sources = lab_sources(settings, steps)
    else:
        sources = user_source(model, data, teacher, tokenizer, steps=steps, device=device, dtype=dtype, **own)
    check_needs(rows, sources)
    _refuse_exits(rows)
    pickle_by_value(rows)
    settled = settle_all(rows, sources, learning_rate, lr_grid)
    config = configuration(rows, sources, settled, runs)
    folder = default_folder("lab" if model is None else sources[0].name, config) if run_folder is None else run_folder
    console = stderr(progress)
    processes = 1 if device != "cpu" else jobs
    if any(isinstance(source, LabSource) for source in sources):
        make_folder(cache.root(), "cache folder (QLENS_CACHE)")  # before anything is written elsewhere
    with locked(folder, config):
        _prepare(sources, console)
        searched = _search(rows, sources, settled, folder, processes, progress)
        choices = _choices(rows, settled, searched)
        all_jobs = _jobs(choices, sources, runs, folder, save)
        records = {job: record for job in all_jobs if (record := job.finished())}
        unfinished = [job for job in all_jobs if job not in records]
        for job in unfinished:
            if damage := job.damage():
                console.print(f"{job.path} is damaged and computed again: {damage}")
        before = f", {len(records)} of them finished before" if records else ""
        sizes = f"{len(sources)} x {len(rows)} methods x {len(runs)} seeds"
        console.print(f"{len(all_jobs)} jobs ({sizes}){before}; run folder {folder}")
        records |= _run(all_jobs, records, config["metric"]["name"], processes, console)
        failed = _failures([*searched, *all_jobs])
        for line in failed:
            console.print(f"failed: {line}")
        if not records:
            raise InputError(f"every job failed; the first: {failed[0]}; tracebacks are in {folder / FAILED}")
        from qlens.analysis.study.study import Study

        scored = {job.source.name for job in records}
        metadata = {source.name: source.metadata for source in sources if source.name in scored}
        noted = {"settings": metadata, "failed": failed}
        study = Study.from_records(
            config | {"noted": noted}, [records[job] for job in all_jobs if job in records], choices
        )
        study.save(folder)
    console.print(f"Report: {folder / 'report.html'}")
    return study


def _refuse_exits(rows: Rows) -> None:
    """Call every user loss once on built-in tokens: one that ends the program would end a worker.

    Other errors are left to the jobs, which see the real vocabulary and record them.

    Raises:
        InputError: a loss calls ``sys.exit``.
    """
    variants = [recipe.variant for row in rows.values() for recipe in row if recipe.variant is not None]
    for variant in (each for each in variants if not each.method.fn.__module__.startswith("qlens.")):
        try:
            variant.loss(probes())
        except SystemExit as error:
            raise InputError(f"{variant.spec} ended the program by sys.exit({error.code!r})") from error
        except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError) as error:
            if isinstance(error.__cause__, SystemExit):  # already reported as InputError
                raise


def _prepare(sources: Sequence[Source], console: Console) -> None:
    """Open the user's sources once, and report what is ignored or dropped."""
    for source in (each for each in sources if isinstance(each, UserSource)):
        metadata = source.metadata
        if matched := metadata.get("vocabulary"):
            console.print(f"{source.name}: {matched}")
        console.print(f"{source.name}: {metadata['data']}")


def _run(
    jobs: Sequence[Job], records: Mapping[Job, Any], metric: str, processes: int | None, console: Console
) -> dict[Job, Any]:
    """Run the jobs without a record, building environments on the way; returns the new records."""
    unfinished = [job for job in in_turn(jobs) if job not in records]
    settings = {job.source.name: job.source.setting for job in unfinished if isinstance(job.source, LabSource)}
    new: dict[Job, Any] = {}
    with tempfile.TemporaryDirectory() as counts:
        unbuilt = constructions(settings.values(), Path(counts))
        table = LiveTable(jobs, unbuilt, metric, processes or joblib.cpu_count(), console)
        for job, record in records.items():
            table.add(job, record, before=True)
        try:
            with table.shown():
                for job in run_all(unfinished, processes, unbuilt):
                    if record := job.finished():
                        new[job] = record
                    table.add(job, record)
        except KeyboardInterrupt:
            console.print(str(table))
            folder = jobs[0].folder
            console.print(f"Stopped. Finished jobs are kept in {folder}: the same call continues from there.")
            raise
    return new


def _search(
    rows: Rows, sources: Sequence[Source], settled: Settled, folder: Path, processes: int | None, progress: bool
) -> list[Any]:
    """Run the trials of the choices that need a search."""
    by_name = {source.name: source for source in sources}
    all_trials = [
        trial
        for (setting, method), rates in settled.items()
        if not isinstance(rates, Choice)
        for trial in trials(by_name[setting], method, rows[method], rates, folder)
    ]
    unfinished = [trial for trial in all_trials if trial.finished() is None]
    build([trial.source.setting for trial in unfinished if isinstance(trial.source, LabSource)], progress)
    if unfinished:
        for _ in track(run_all(unfinished, processes), len(unfinished), "searching learning rates", progress):
            pass
    return all_trials


def _choices(rows: Rows, settled: Settled, searched: Sequence[Any]) -> dict[tuple[str, str], Choice]:
    """All choices in order, the searched ones included; none where every rate failed."""
    choices = {}
    for (setting, method), choice in settled.items():
        if isinstance(choice, Choice):
            choices[setting, method] = choice
            continue
        matching = [trial for trial in searched if (trial.source.name, trial.method) == (setting, method)]
        if scores := gathered(matching):
            choices[setting, method] = chosen(rows[method], scores, "search")
    return choices


def _jobs(
    choices: Mapping[tuple[str, str], Choice], sources: Sequence[Source], seeds: Sequence[int], folder: Path, save: bool
) -> list[Job]:
    """A job per seed, setting and method."""
    by_name, jobs = {source.name: source for source in sources}, []
    for seed in seeds:
        for (setting, method), choice in choices.items():
            source = by_name[setting]
            name = f"{slug(method)}-{seed}" if isinstance(source, UserSource) else f"{setting}-{slug(method)}-{seed}"
            jobs.append(
                Job(
                    folder=folder,
                    source=source,
                    method=method,
                    recipe=choice.recipe,
                    learning_rate=choice.learning_rate,
                    seed=seed,
                    reads=seed == seeds[0],
                    keep=folder / "models" / name if save and choice.recipe.variant is not None else None,
                )
            )
    return jobs


def _failures(tasks: Sequence[Task]) -> list[str]:
    """A line per failed task: its last error, and the file of its traceback."""
    lines = []
    for task in tasks:
        if task.trace.is_file():
            error = task.trace.read_text(encoding="utf-8").strip().splitlines()[-1]
            lines.append(
                f"{task.method} in {task.source.name} at seed {task.seed}: {error} ({FAILED}/{task.trace.name})"
            )
    return lines
