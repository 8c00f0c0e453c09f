"""Building of environments on first use, in as many processes as there are environments."""

import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path

from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor
from rich.progress import Progress

from qlens.core.errors import UnknownName
from qlens.core.progress import Lines, interactive, stderr
from qlens.lab.environment import World, steps_of
from qlens.lab.setting import SETTINGS, Setting


def world(setting: str | Setting, progress: bool = True) -> World:
    """The environment of a setting, built on first use (half a minute) and cached.

    The cache folder is ``$QLENS_CACHE``, else ``$XDG_CACHE_HOME/qlens`` or ``~/.cache/qlens``. An interrupted build resumes
    after the last finished part (base, teacher); one of several processes builds; damaged files are built again.

    Args:
        setting: a name in ``qlens.lab.SETTINGS``, or a ``Setting``.
        progress: whether to report on stderr.

    Returns:
        models, demonstrations and problems.

    Raises:
        UnknownName: no setting has this name.

    Example:
        >>> world = qlens.lab.world("strong-prior")                                        # doctest: +SKIP
        >>> world.score(world.base(), world.test, k=8, seed=0).mean()                      # doctest: +SKIP
    """
    if isinstance(setting, str):
        if setting not in SETTINGS:
            raise UnknownName.among("setting", setting, SETTINGS)
        setting = SETTINGS[setting]
    build([setting], progress)
    return World(setting)


@dataclass(frozen=True)
class Construction:
    """The building of one environment, whose progress every process can read.

    Args:
        setting: of the environment.
        file: its size is the number of finished steps.
    """

    setting: Setting
    file: Path

    @property
    def total(self) -> int:
        """Number of steps."""
        return sum(steps_of(self.setting).values())

    @property
    def done(self) -> int:
        """Number of finished steps."""
        return min(self.file.stat().st_size, self.total) if self.file.is_file() else 0

    def run(self) -> None:
        """Build what is missing in the cache."""
        with self.file.open("ab", buffering=0) as file:
            World(self.setting).build(lambda steps: file.write(b"." * steps))


def constructions(settings: Iterable[Setting], folder: Path) -> dict[str, Construction]:
    """The environments that are not in the cache, by the names of their settings, to be counted in a folder."""
    missing = [setting for setting in settings if not World(setting).whole()]
    return {setting.name: Construction(setting, folder / setting.name) for setting in missing}


def build(settings: Sequence[Setting], progress: bool = True) -> None:
    """Build the environments that are not in the cache, each in a process of its own if there are several."""
    console = stderr(progress)
    with tempfile.TemporaryDirectory() as folder:
        missing = list(constructions(settings, Path(folder)).values())
        if not missing:
            return
        with Progress(console=console, disable=not (progress and interactive(console))) as bar:
            names = [f"building {each.setting.name}" for each in missing]
            bars = [bar.add_task(name, total=each.total) for name, each in zip(names, missing, strict=True)]
            lines = [Lines(name, each.total, console) for name, each in zip(names, missing, strict=True)]

            def advance(number: int, steps: int) -> None:
                bar.advance(bars[number], steps)
                if not interactive(console):
                    lines[number].advance(steps)

            if len(missing) == 1:
                World(missing[0].setting).build(lambda steps: advance(0, steps))
                return
            done = [0] * len(missing)
            with ProcessPoolExecutor(min(len(missing), cpu_count())) as workers:
                running = [workers.submit(each.run) for each in missing]
                unfinished = True
                while unfinished:
                    unfinished = bool(wait(running, timeout=0.5).not_done)
                    for number, each in enumerate(missing):
                        if (now := each.done) > done[number]:
                            advance(number, now - done[number])
                            done[number] = now
                for each in running:
                    each.result()
