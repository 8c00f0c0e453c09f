"""Progress of long work on stderr: a bar in a terminal or notebook, plain lines at intervals elsewhere."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERVAL = 30.0  # seconds between lines

T = TypeVar("T")


class Lines:
    """Progress as lines of a log file, at most one per ``INTERVAL`` and one at the end."""

    def __init__(self, description: str, total: int, console: Console):
        self.description, self.total, self.console = description, total, console
        self.done, self.start = 0, time.monotonic()
        self.printed = self.start

    def advance(self, steps: int = 1) -> None:
        """Count steps, and print a line if one is due."""
        self.done += steps
        now = time.monotonic()
        if self.done < self.total and now - self.printed < INTERVAL:
            return
        self.printed, elapsed = now, now - self.start
        remaining = elapsed * (self.total - self.done) / max(self.done, 1)
        rest = f", about {duration(remaining)} left" if self.done < self.total else ""
        self.console.print(f"{self.description}: {self.done} of {self.total} after {duration(elapsed)}{rest}")


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


def track(items: Iterable[T], total: int, description: str, progress: bool = True) -> Iterator[T]:
    """Yield items, and show how many of the total have been processed."""
    console = stderr(progress)
    if interactive(console) or not progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not progress) as bar:
            yield from bar.track(items, total, description=description)
        return
    lines = Lines(description, total, console)
    for item in items:
        yield item
        lines.advance()
