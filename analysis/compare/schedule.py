"""Schedule: tasks in parallel processes; an environment of the lab is built by the first task that needs it."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor

import joblib

from qlens.analysis.compare.jobs import Job, Task
from qlens.core.errors import InputError
from qlens.lab.building import Construction

Constructions = Mapping[str, Construction]
"""The environments that are not built yet, by the names of their settings."""


def in_turn(jobs: Sequence[Job]) -> list[Job]:
    """Jobs in the order of running: seed by seed and setting by setting, so that a table fills setting by setting.

    The first seed keeps the order of the methods. Later ones run the longest jobs first, those with more models, so that
    the last processes end together.
    """
    seeds, settings = (
        list(dict.fromkeys(values)) for values in zip(*((j.seed, j.source.name) for j in jobs), strict=True)
    )

    def place(job: Job) -> tuple[int, int, int]:
        later = job.seed != seeds[0] and job.recipe.variant is not None
        return seeds.index(job.seed), settings.index(job.source.name), -job.cost * later

    return sorted(jobs, key=place)


def run_all(tasks: Sequence[Task], processes: int | None, constructions: Constructions | None = None) -> Iterator[Task]:
    """Run tasks in parallel processes of one thread each (joblib: loky, or the backend of ``joblib.parallel_config``).

    Args:
        tasks: in the order of running, as far as their environments are built.
        processes: how many; None: the number of cores.
        constructions: environments that are built on the way.

    Yields:
        The tasks as they end.

    Raises:
        InputError: a worker process was killed, or an environment cannot be built.
    """
    if not tasks:
        return
    workers = min(processes or joblib.cpu_count(), len(tasks))
    run = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
    try:
        for number in run(joblib.delayed(_run)(*each) for each in _ready_first(tasks, constructions or {})):
            yield tasks[number]
    except BrokenExecutor as error:
        raise InputError(
            "a worker process ended: it was killed (out of memory?), or a loss ended it; the same call continues from "
            "the finished jobs, and needs less memory with fewer jobs="
        ) from error


def _ready_first(
    tasks: Sequence[Task], constructions: Constructions
) -> Iterator[tuple[int, Task, Construction | None]]:
    """Tasks with their numbers, and the construction that precedes them.

    In their order, but those whose environment is being built come later, so that no process waits for another.
    """
    waiting, begun = dict(enumerate(tasks)), set()

    def unbuilt(task: Task) -> Construction | None:
        construction = constructions.get(task.source.name)
        return None if construction is None or construction.done == construction.total else construction

    while waiting:
        ready = (n for n, task in waiting.items() if task.source.name not in begun or unbuilt(task) is None)
        number = next(ready, next(iter(waiting)))
        task = waiting.pop(number)
        begun.add(task.source.name)
        yield number, task, unbuilt(task)


def _run(number: int, task: Task, construction: Construction | None) -> int:
    if construction is not None:
        construction.run()
    task.run()
    return number
