"""Environment of one setting: language, models, demonstrations and problems."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from qlens.core.numerics import expectation
from qlens.data.examples import encode
from qlens.data.from_text import tokens_from_text
from qlens.data.model_folders import quiet
from qlens.data.models import load_model
from qlens.lab import cache
from qlens.lab.language import Demonstration, Problem, Writer, make_tokenizer, problems, verify
from qlens.lab.models import longest, new_model, sample
from qlens.lab.setting import Setting
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

    @cached_property
    def demonstrations(self) -> list[Demonstration]:
        """Solutions to train on."""
        return self._demonstrations()

    @cached_property
    def validation(self) -> list[Problem]:
        """Problems on which learning rates are chosen."""
        return self._distinct("validation", self.setting.validation)

    @cached_property
    def test(self) -> list[Problem]:
        """Problems that are scored."""
        return self._distinct("test", self.setting.test)

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
        examples = encode(self._rows(role), self.tokenizer, progress=False).examples
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


def steps_of(setting: Setting) -> dict[str, int]:
    """Parts of an environment in the order of building, with their numbers of steps."""
    return {"base": setting.pretrain_steps, "teacher": setting.teach_steps, "measured": 1}
