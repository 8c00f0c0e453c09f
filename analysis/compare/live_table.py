"""Live table: the scores of a comparison on stderr while it runs, with the time left."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from qlens.analysis.compare.environments import LabSource
from qlens.analysis.compare.jobs import Job
from qlens.analysis.compare.schedule import Constructions
from qlens.analysis.table_formats import text_table
from qlens.core.progress import INTERVAL, duration, interactive

LAB_STEP = 0.03  # seconds of a training step in the lab, for the time left before the first one is done

LEAST_SHARE = 0.005  # of the work, from which a rate is measured


class LiveTable:
    """Mean scores of the finished jobs, by method and setting.

    In a terminal the table and a bar are redrawn in place. Elsewhere the table is printed when the first job that trains has
    ended, when the first seed of a setting is complete, and as often as every ``INTERVAL`` seconds while jobs end; lines in
    between say what is done.

    Args:
        jobs: of the comparison, finished ones included.
        constructions: environments that are built on the way.
        metric: name of the score.
        processes: that run the jobs.
        console: where it is shown.
    """

    def __init__(
        self, jobs: Sequence[Job], constructions: Constructions, metric: str, processes: int, console: Console
    ):
        self.jobs, self.constructions, self.metric, self.console = jobs, constructions, metric, console
        self.scores: dict[Job, float] = {}
        self.ended = 0  # failed jobs included
        self.total = sum(job.cost for job in jobs) + sum(each.total for each in constructions.values())
        self.done_before = self.jobs_done = 0
        self.expected = self.total * LAB_STEP / processes if isinstance(jobs[0].source, LabSource) else None
        self.start = self.printed = time.monotonic()
        self.first = self.last = (0.0, 0.0)  # time and share of the work done, when the first and the last step ended
        self.printed_jobs = 0

    def add(self, job: Job, record: Mapping[str, Any] | None, before: bool = False) -> None:
        """Count a job that has ended, with its record; None if it failed.

        Args:
            job: one of the jobs.
            record: its record.
            before: whether it had been finished before this call.
        """
        self.ended += 1
        self.jobs_done += job.cost
        self.done_before += job.cost * before
        if record is not None:
            self.scores[job] = float(np.mean(record["scores"]))
        first = not self.printed_jobs and job.recipe.variant is not None and record is not None
        if not before and not interactive(self.console) and (first or self._completes_first_seed(job)):
            self._print_table()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Context in which the table is shown."""
        if self.console.quiet:
            yield
            return
        self.start = self.printed = time.monotonic()
        if interactive(self.console):
            with Live(get_renderable=self._renderable, console=self.console, refresh_per_second=2, transient=True):
                yield
            return
        over = threading.Event()
        printer = threading.Thread(target=self._print_at_intervals, args=(over,), daemon=True)
        printer.start()
        try:
            yield
        finally:
            over.set()
            printer.join()

    @property
    def cells(self) -> pd.DataFrame:
        """A row per method, a column per setting: mean over the finished seeds, with their number."""
        rows: dict[str, dict[str, list[float]]] = {}
        settings = list(dict.fromkeys(job.source.name for job in self.jobs))
        for job, score in self.scores.items():
            rows.setdefault(job.method, {}).setdefault(job.source.name, []).append(score)
        methods = [name for name in dict.fromkeys(job.method for job in self.jobs) if name in rows]
        frame = pd.DataFrame({"method": methods})
        for setting in settings:
            values = [rows[method].get(setting, []) for method in methods]
            frame[setting] = [f"{np.mean(each):.3f} ({len(each)})" if each else "-" for each in values]
        return frame

    def __str__(self) -> str:
        heading = (
            f"{self.metric} after {len(self.scores)} of {len(self.jobs)} jobs: means, with the number of seeds; intervals "
            "and ranks come at the end"
        )
        return heading if not self.scores else f"{heading}\n{text_table(self.cells)}"

    @property
    def status(self) -> str:
        """What is done, and about how long the rest takes."""
        building = [f"building {c.setting.name}: {c.done} of {c.total}" for c in self._unbuilt()]
        remaining = self._remaining()
        rest = "" if remaining is None else f", about {duration(remaining)} left"
        parts = [*building, f"{self.ended} of {len(self.jobs)} jobs"]
        return f"{'; '.join(parts)} after {duration(time.monotonic() - self.start)}{rest}"

    def _remaining(self) -> float | None:
        """Seconds until the end at the rate since the first step; at that of ``LAB_STEP`` before there is one."""
        share, now = self._share(), time.monotonic()
        if share > self.last[1]:
            self.last = now, share
            self.first = self.first if self.first[1] else self.last
        (began, before), (ended, after) = self.first, self.last
        if after - before < LEAST_SHARE:
            return None if self.expected is None else self.expected * (1 - share)
        return max((ended - began) / (after - before) * (1 - after) - (now - ended), 0.0)

    def _unbuilt(self) -> list[Any]:
        return [each for each in self.constructions.values() if each.done < each.total]

    def _share(self) -> float:
        """The share of this call's work that is done, by the durations of jobs in training steps."""
        done = self.jobs_done - self.done_before + sum(each.done for each in self.constructions.values())
        return done / max(self.total - self.done_before, 1)

    def _completes_first_seed(self, job: Job) -> bool:
        first = [each for each in self.jobs if each.source == job.source and each.seed == self.jobs[0].seed]
        return job in first and all(each in self.scores for each in first)

    def _renderable(self) -> RenderableType:
        bar = Progress(TextColumn("{task.description}"), BarColumn(), console=self.console)
        bar.add_task(self.status, total=1.0, completed=self._share())
        return Group(Text(str(self)), bar) if self.scores else bar

    def _print_at_intervals(self, over: threading.Event) -> None:
        while not over.wait(1.0):
            if time.monotonic() - self.printed < INTERVAL:
                continue
            if len(self.scores) > self.printed_jobs:
                self._print_table()
            self.printed = time.monotonic()
            self.console.print(self.status)

    def _print_table(self) -> None:
        self.printed, self.printed_jobs = time.monotonic(), len(self.scores)
        self.console.print(str(self))
