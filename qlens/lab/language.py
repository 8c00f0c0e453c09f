"""Language of the lab: chains of digit arithmetic, solutions in one of many wordings, and their verifier.

A problem is a chain modulo 10, read from left to right; a solution works out every step, with phrases that its annotator
prefers, and ends in an answer:

    problem     7 plus 5 minus 3 times 3 ?
    solution    first 7 plus 5 gives 2 , then 2 minus 3 is 9 , now 9 times 3 makes 7 , so answer 7
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from qlens.core.deprecation import warn
from qlens.lab.setting import Annotator

OPERATIONS = ("plus", "minus", "times")
WORDINGS = {
    "opening": ("first", "start :", "to begin", "we have"),
    "linking": ("then", "next", "now", "after that"),
    "result": ("is", "gives", "makes", "equals"),
    "closing": ("so", "hence", "thus the", "in all the"),
}
LONGEST_STEP, LONGEST_ENDING = 8, 6  # in tokens: a step with its comma; closing, answer and end token
ANSWER = re.compile(r".*\banswer ([0-9])", re.DOTALL)
SPLITS = {"corpus": 0.5, "tutor": 0.3, "demonstrations": 0.1, "validation": 0.05, "test": 0.05}


def compute(operation: str, a: int, b: int, modulus: int) -> int:
    """a op b modulo ``modulus``."""
    return {"plus": a + b, "minus": a - b, "times": a * b}[operation] % modulus


@dataclass(frozen=True)
class Problem:
    """A chain: the first digit, then operations with their digits, modulo ``modulus``."""

    start: int
    links: tuple[tuple[str, int], ...]
    modulus: int = 10

    @property
    def prompt(self) -> str:
        """The question in words: 2 + 2 x depth tokens."""
        return " ".join([str(self.start), *(f"{operation} {digit}" for operation, digit in self.links), "?"])

    @property
    def answer(self) -> int:
        """The right answer."""
        value = self.start
        for operation, digit in self.links:
            value = compute(operation, value, digit, self.modulus)
        return value


@dataclass(frozen=True)
class Demonstration:
    """A solution to train on; ``clean``: whether every step and the answer are right."""

    problem: Problem
    completion: str
    clean: bool

    @property
    def prompt(self) -> str:
        """The question in words."""
        return self.problem.prompt

    @property
    def correct(self) -> list[bool | None]:
        """Whether each word of the completion follows from the words before it; None for words that no fact decides.

        Results of steps and the answer are judged. A step computed rightly from a wrong digit is right.
        """
        words = self.completion.split()
        judgements: list[bool | None] = [None] * len(words)
        value = ""
        for i in range(4, len(words)):
            a, operation, b, _, result = words[i - 4 : i + 1]
            if operation in OPERATIONS and all(word.isdigit() for word in (a, b, result)):
                value = str(compute(operation, int(a), int(b), self.problem.modulus))
                judgements[i], value = result == value, result
        judgements[-1] = words[-1] == value
        return judgements

    @property
    def truth(self) -> list[bool | None]:
        """The old name of ``correct``."""
        warn("Demonstration.truth", "Demonstration.correct")
        return self.correct


def verify(problem: Problem, completion: str) -> bool:
    """Whether the completion ends in the right answer and gives no other; its steps do not count.

    Example:
        >>> verify(Problem(7, (("plus", 5),)), "first 7 plus 5 is 2 , so answer 2")
        True
    """
    match = ANSWER.fullmatch(completion.strip())
    return bool(match) and completion.split().count("answer") == 1 and int(match[1]) == problem.answer


def split_of(prompt: str) -> str:
    """The part of the environment that a prompt belongs to, by its hash, so that no two parts share a prompt."""
    point = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) / 2**64
    for split, share in SPLITS.items():
        point -= share
        if point < 0:
            return split
    return list(SPLITS)[-1]  # the shares add up to 1 up to rounding


def problems(split: str, depth: int, modulus: int, rng: random.Random) -> Iterator[Problem]:
    """Endless uniform draws of problems of one part; they may repeat."""
    while True:
        start, *digits = rng.choices(range(modulus), k=depth + 1)
        problem = Problem(start, tuple(zip(rng.choices(OPERATIONS, k=depth), digits, strict=True)), modulus)
        if split_of(problem.prompt) == split:
            yield problem


class Writer:
    """Writes solutions in the words of an annotator, with its false facts and slips."""

    def __init__(self, annotator: Annotator, modulus: int, rng: random.Random):
        self.annotator, self.modulus, self.rng = annotator, modulus, rng
        self.habits = {
            part: [rng.gammavariate(annotator.wording, 1) for _ in words] for part, words in WORDINGS.items()
        }
        self.table = {}
        for number, operation in enumerate(OPERATIONS):
            mistaken = OPERATIONS[(number + 1) % len(OPERATIONS)]
            pairs = list(itertools.product(range(modulus), repeat=2))
            false = set(rng.sample(pairs, round(len(pairs) * annotator.false[number])))
            for a, b in pairs:
                self.table[operation, a, b] = compute(mistaken if (a, b) in false else operation, a, b, modulus)

    @property
    def entropy(self) -> float:
        """Mean entropy of a phrase, in nats."""
        return float(np.mean([stats.entropy(habits) for habits in self.habits.values()]))

    def write(self, problem: Problem, error: int | None = None) -> tuple[str, bool]:
        """A solution, and whether all of it is right.

        Args:
            problem: what to solve.
            error: the step (depth: the answer) that gets a random wrong digit.
        """
        value, parts, right = problem.start, [], True
        for number, (operation, digit) in enumerate(problem.links):
            result = self.table[operation, value, digit]
            if number == error or self.rng.random() < self.annotator.slip[OPERATIONS.index(operation)]:
                result = self._other(result)
            right = right and result == compute(operation, value, digit, self.modulus)
            link = self._phrase("linking" if number else "opening")
            parts.append(f"{link} {value} {operation} {digit} {self._phrase('result')} {result}")
            value = result
        answer = self._other(value) if error == len(problem.links) else value
        return " , ".join([*parts, f"{self._phrase('closing')} answer {answer}"]), right and answer == value

    def _phrase(self, part: str) -> str:
        return self.rng.choices(WORDINGS[part], self.habits[part])[0]

    def _other(self, digit: int) -> int:
        return (digit + self.rng.randrange(1, self.modulus)) % self.modulus


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the language, with left padding for generation."""
    phrases = " ".join(phrase for group in WORDINGS.values() for phrase in group).split()
    words = ["<pad>", "<eos>", "<unk>", *"0123456789", *OPERATIONS, "?", ",", "answer", *dict.fromkeys(phrases)]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
