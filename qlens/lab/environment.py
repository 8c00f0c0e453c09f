"""Environment of one setting: language, models, demonstrations and problems, built on first use."""

import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor
from rich.progress import Progress
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from qlens.core.errors import UnknownName
from qlens.core.numerics import expectation
from qlens.core.progress import Lines, interactive, stderr
from qlens.data.examples import encode
from qlens.data.from_text import tokens_from_text
from qlens.data.models import load_model, quiet
from qlens.lab import cache
from qlens.lab.language import Demonstration, Problem, Writer, make_tokenizer, problems, verify
from qlens.lab.models import longest, new_model, sample
from qlens.lab.setting import SETTINGS, Setting
from qlens.training.fitting import fit, isolated

VERSION = 2  # of the lab; raised when the same setting would give another environment
MEASURED_ROWS = 400  # demonstrations that models are measured on


class World:
    """The environment of a setting: models, demonstrations and problems; see ``qlens.lab.world``.

    Attributes:
        setting: its definition.
        folder: parent of the Hugging Face folders ``base`` and ``teacher``.
        tokenizer: of all models.
        demonstrations: solutions to train on; ``clean`` says whether all of one is right.
        validation, test: problems with their answers. No prompt occurs in two parts, corpora included.
        measured: accuracies, noise and ambiguity.
    """

    def __init__(self, setting: Setting):
        self.setting = setting
        self.folder = cache.root() / "lab" / f"{setting.name}-v{VERSION}-{setting.key}"
        self.tokenizer: PreTrainedTokenizerFast = make_tokenizer()
        self.demonstrations = self._demonstrations()
        self.validation = self._distinct("validation", setting.validation)
        self.test = self._distinct("test", setting.test)

    def base(self) -> LlamaForCausalLM:
        """A fresh copy of the base model: float32, evaluation mode."""
        return self._load("base")

    def teacher(self) -> LlamaForCausalLM:
        """A fresh copy of the teacher: float32, evaluation mode."""
        return self._load("teacher")

    @cached_property
    def measured(self) -> dict[str, float]:
        """Measurements by name.

        ``base``, ``teacher``: accuracies, avg@k on the test problems. Of the demonstrations, ``noise_asked``: the setting's
        ``noise``; ``noise``: the share with any error, false facts of the annotator included; ``wrong_answers``: the share
        with a wrong answer; ``wrong_digits``: the share of results and answers that do not follow from the text before;
        ``base_right``, ``base_agrees``: how often the base model solves their problems, and gives their answer.
        ``wordings``: exp of the mean entropy of a phrase. ``kl_base_teacher``: mean KL(base || teacher) per token of the
        demonstrations, in nats."""
        return json.loads((self.folder / "measured" / "measured.json").read_text(encoding="utf-8"))

    def verify(self, problem: Problem, completion: str) -> bool:
        """Whether the completion ends in the right answer and gives no other."""
        return verify(problem, completion)

    def score(self, model: LlamaForCausalLM, problems: Sequence[Problem], k: int, seed: int) -> np.ndarray:
        """avg@k of every problem, (len(problems),): the share right among k completions at temperature 1."""
        completions = sample(model, self.tokenizer, problems, k, seed, longest(self.setting))
        return np.array(
            [
                np.mean([verify(problem, text) for text in texts])
                for problem, texts in zip(problems, completions, strict=True)
            ]
        )

    @property
    def steps(self) -> dict[str, int]:
        """Parts in the order of building, with their numbers of steps."""
        return steps_of(self.setting)

    def whole(self) -> bool:
        """Whether all parts are in the cache."""
        return all(cache.whole(self.folder / name) for name in self.steps)

    def build(self, tick: Callable[[int], None] = lambda steps: None) -> None:
        """Build the parts that are missing in the cache, one process at a time.

        Args:
            tick: called with the number of finished steps; for a cached part once, with all of them.
        """
        parts: dict[str, Callable[[Path, Callable[[], None]], None]] = {
            "base": self._make_base,
            "teacher": self._make_teacher,
            "measured": self._make_measured,
        }
        with cache.locked(self.folder):
            for number, (name, make) in enumerate(parts.items()):
                if cache.whole(self.folder / name):
                    tick(self.steps[name])
                    continue
                for stale in list(parts)[number:]:  # later parts depend on this one
                    cache.discard(self.folder / stale)
                with cache.sealed(self.folder / name) as folder:
                    make(folder, lambda: tick(1))

    def _make_base(self, folder: Path, tick: Callable[[], None]) -> None:
        with isolated(seed := self._random("base").randrange(2**31)):
            model = new_model(self.setting, self.tokenizer)
        budget = {"steps": self.setting.pretrain_steps, "learning_rate": self.setting.pretrain_rate, "seed": seed}
        self._save(self._fit(model, "corpus", tick, **budget), folder)

    def _make_teacher(self, folder: Path, tick: Callable[[], None]) -> None:
        seed = self._random("teacher").randrange(2**31)
        budget = {"steps": self.setting.teach_steps, "learning_rate": self.setting.teach_rate, "seed": seed}
        self._save(self._fit(self.base(), "tutor", tick, **budget), folder)

    def _make_measured(self, folder: Path, tick: Callable[[], None]) -> None:
        base, teacher, rows = self.base(), self.teacher(), self.demonstrations[:MEASURED_ROWS]
        pairs = [(each.prompt, each.completion) for each in rows]
        tokens = tokens_from_text(base, self.tokenizer, pairs, teacher=teacher, batch_size=len(pairs))
        gap = expectation(tokens.probs, tokens.log_probs - tokens.log_probs_of("teacher"))
        wrong = [not verify(each.problem, each.completion) for each in self.demonstrations]
        digits = [right for each in self.demonstrations for right in each.correct if right is not None]
        samples = sample(base, self.tokenizer, [each.problem for each in rows], 1, 0, longest(self.setting))
        texts = [text for (text,) in samples]
        answers = [(text.split()[-1:], each.completion.split()[-1:]) for text, each in zip(texts, rows, strict=True)]
        measured = {
            "base": self.score(base, self.test, self.setting.k, 0).mean(),
            "teacher": self.score(teacher, self.test, self.setting.k, 0).mean(),
            "noise_asked": self.setting.noise,
            "noise": np.mean([not each.clean for each in self.demonstrations]),
            "wrong_answers": np.mean(wrong),
            "wrong_digits": 1 - np.mean(digits),
            "base_right": np.mean([verify(each.problem, text) for each, text in zip(rows, texts, strict=True)]),
            "base_agrees": np.mean([answer == label for answer, label in answers]),
            "wordings": np.exp(self._writer("scribe").entropy),
            "kl_base_teacher": gap.mean().item(),
        }
        text = json.dumps({name: float(value) for name, value in measured.items()}, indent=1)
        (folder / "measured.json").write_text(text, encoding="utf-8")
        tick()

    def _fit(self, model: LlamaForCausalLM, role: str, tick: Callable[[], None], **budget: Any) -> LlamaForCausalLM:
        examples = encode(self._rows(role), self.tokenizer, None).examples
        return fit(model, examples, batch_size=self.setting.pretrain_batch, tick=tick, **budget)

    def _save(self, model: LlamaForCausalLM, folder: Path) -> None:
        with quiet():
            model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _load(self, name: str) -> LlamaForCausalLM:
        return load_model(self.folder / name, dtype="float32")

    def _random(self, purpose: str) -> random.Random:
        return random.Random(f"{self.setting.seed} {purpose}")

    def _writer(self, role: str) -> Writer:
        return Writer(getattr(self.setting, role), self.setting.modulus, self._random(role))

    def _problems(self, split: str) -> Iterator[Problem]:
        return problems(split, self.setting.depth, self.setting.modulus, self._random(f"{split} problems"))

    def _distinct(self, split: str, count: int) -> list[Problem]:
        problems, distinct = self._problems(split), dict[Problem, None]()
        while len(distinct) < count:
            distinct.setdefault(next(problems))
        return list(distinct)

    def _rows(self, role: str) -> list[dict[str, str]]:
        writer = self._writer(role)
        problems = islice(self._problems(role), self.setting.corpus_rows)
        return [{"prompt": problem.prompt, "completion": writer.write(problem)[0]} for problem in problems]

    def _demonstrations(self) -> list[Demonstration]:
        setting, rng = self.setting, self._random("noise")
        writer = self._writer("scribe")
        demonstrations = []
        for problem in self._distinct("demonstrations", setting.demonstrations):
            error = rng.randrange(setting.depth + 1) if rng.random() < setting.noise else None
            demonstrations.append(Demonstration(problem, *writer.write(problem, error)))
        return demonstrations


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


def steps_of(setting: Setting) -> dict[str, int]:
    """Parts of an environment in the order of building, with their numbers of steps."""
    return {"base": setting.pretrain_steps, "teacher": setting.teach_steps, "measured": 1}


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
