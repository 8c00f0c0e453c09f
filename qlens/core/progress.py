"""Progress of long work on stderr: a bar in a terminal or notebook, plain lines at intervals elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

INTERVAL = 30.0  # seconds between lines

T = TypeVar("T")


class Lines:
    """Progress as lines of a log file, at most one per ``INTERVAL`` and one at the end.

    Args:
        description: what is done.
        total: number of steps.
        console: where lines go.
        unit: what a step is, for the rate; "": none is shown.
        done: steps that were done before.
    """

    def __init__(self, description: str, total: int, console: Console, unit: str = "", done: int = 0):
        self.description, self.total, self.console, self.unit = description, total, console, unit
        self.before = self.done = done
        self.printed = self.start = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        """Count steps, and print a line if one is due."""
        self.done += steps
        now = time.monotonic()
        if self.done < self.total and now - self.printed < INTERVAL:
            return
        self.printed, elapsed = now, now - self.start
        new = max(self.done - self.before, 1)
        rest = f", about {duration(elapsed * (self.total - self.done) / new)} left" if self.done < self.total else ""
        rate = f", {new / max(elapsed, 1e-9):.2f} {self.unit}/s" if self.unit else ""
        self.console.print(f"{self.description}: {self.done} of {self.total} after {duration(elapsed)}{rate}{rest}")


class Rate(ProgressColumn):
    """The rate of a bar, in its unit per second."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The rate of the last seconds."""
        return Text(f"{task.speed:.2f} {self.unit}/s" if task.speed else "")


def stderr(progress: bool = True) -> Console:
    """A console on stderr that prints text as it is; quiet without ``progress``."""
    return Console(stderr=True, quiet=not progress, highlight=False, markup=False, soft_wrap=True)


def interactive(console: Console) -> bool:
    """Whether a console can show a moving bar."""
    return console.is_terminal or console.is_jupyter


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss.

    Example:
        >>> duration(75), duration(3675)
        ('1:15', '1:01:15')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


@contextmanager
def bar(
    total: int, description: str, unit: str = "", done: int = 0, progress: bool = True
) -> Iterator[Callable[..., None]]:
    """A function that counts steps of a bar or of lines: ``advance()`` one, ``advance(n)`` several.

    Args:
        total: number of steps.
        description: what is done.
        unit: what a step is, such as "rows", for the rate; "": none is shown.
        done: steps that were done before; neither rate nor time left counts them.
        progress: whether anything is shown.
    """
    console = stderr(progress)
    if interactive(console) or not progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        rate = (Rate(unit),) if unit else ()
        with Progress(*columns, *rate, TimeRemainingColumn(), console=console, disable=not progress) as shown:
            task = shown.add_task(description, total=total, completed=done)
            yield lambda steps=1: shown.advance(task, steps)
        return
    yield Lines(description, total, console, unit, done).advance


def track(items: Iterable[T], total: int, description: str, progress: bool = True) -> Iterator[T]:
    """Yield items, and show how many of the total have been processed."""
    with bar(total, description, progress=progress) as advance:
        for item in items:
            yield item
            advance()
