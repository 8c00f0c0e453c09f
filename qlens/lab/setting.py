"""Setting: the plain numbers from which a world is derived, and the settings there are.

How the numbers were chosen. Only three accuracies were looked at, the base's, the teacher's and plain SFT's on the
validation problems at the rates 1e-3, 3e-3 and 1e-2; no other method was run before the numbers stood. All three lie
between .1 and .9 in every setting, and neither the demonstrations nor the teacher hold the whole truth: both have
false facts of their own, so that learning the most frequent digit perfectly is not enough. What was tried and dropped:

- weak-prior with ``times`` at slip .9, never learned at all: SFT stood at .36, too little to tell methods apart; at .7
SFT (.76) stood above the teacher (.75). The first version of this setting, whose base takes ``times`` for ``plus``, is
wrong-prior now: that base is not unsure, it is sure of what is false. - poor-teacher with a tutor that slips at .25: a
teacher at .25, hardly a teacher. What stands differs from strong-prior in the tutor alone. - clean-labels with
strong-prior's base: SFT stood at .98.

wrong-prior has weak-prior's demonstrations and problems, and poor-teacher has strong-prior's and its base too: methods
without a teacher give the same numbers in those two.

``steps`` was 150; wrong-prior was cut to 100 because at 150 SFT stood at the share of right answers among its
demonstrations, and clean-labels with it. ``learning_rate`` is what a setting of one's own uses where nothing was
searched; the rates of the settings here were searched for every method alike
(``qlens.analysis.compare.learning_rates``) and lie in ``rates.json``.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass

from qlens.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Author:
    """Who writes worked solutions: how careless, with which false beliefs, in which words.

    Args:
        slip: for plus, minus and times, the probability that a step gets a random wrong digit; the rest is worked out
            from that digit. At (modulus - 1) / modulus every digit is as likely: nothing can be learned of it.
        false: for plus, minus and times, the share of the facts "a op b" that the author has wrong, always in the same
            way: worked out as if by the next of the three operations.
        wording: how evenly the author uses the wordings: the concentration of a Dirichlet distribution.
    """

    slip: tuple[float, float, float] = (0.0, 0.0, 0.0)
    false: tuple[float, float, float] = (0.0, 0.0, 0.0)
    wording: float = 2.0

    def __post_init__(self):
        if not all(0 <= share <= 1 for share in (*self.slip, *self.false)):
            raise InputError(f"slip and false are shares between 0 and 1, got slip={self.slip}, false={self.false}")
        if self.wording <= 0:
            raise InputError(f"wording must be positive, got {self.wording}")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A world of the lab in plain numbers: everything else follows from them.

    Args:
        name: what the setting is called.
        corpus: who writes what the base is pretrained on.
        tutor: who writes what the teacher, a copy of the base, is trained on further.
        scribe: who writes the demonstrations.
        noise: share of the demonstrations that get one more error: a random digit in a step (and carried on) or as answer.
        depth: steps per problem; ``modulus``: the hours of the clock, 2 to 10.
        demonstrations, validation, test: how many of each.
        width, layers, heads: of the models.
        corpus_rows: how many the corpus and the tutor write each; pretrain_steps, pretrain_rate, teach_steps, teach_rate,
            pretrain_batch: how base and teacher are trained on them.
        steps, batch_size, learning_rate: of every fine-tuning, whatever the method; ``k``: samples per problem.
        seed: of everything random in the world.

    Raises:
        InputError: numbers that make no world.
    """

    name: str
    corpus: Author
    tutor: Author
    scribe: Author = Author()
    noise: float = 0.0
    depth: int = 3
    modulus: int = 10
    demonstrations: int = 2400
    validation: int = 64
    test: int = 100
    width: int = 64
    layers: int = 2
    heads: int = 4
    corpus_rows: int = 16000
    pretrain_steps: int = 1400
    pretrain_rate: float = 5e-3
    teach_steps: int = 400
    teach_rate: float = 3e-3
    pretrain_batch: int = 32
    steps: int = 150
    batch_size: int = 32
    learning_rate: float = 3e-3
    k: int = 8
    seed: int = 0

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise InputError(f"name must be fit for a folder (letters, digits, - _ .), got {self.name!r}")
        if not 0 <= self.noise <= 1:
            raise InputError(f"noise is a share between 0 and 1, got {self.noise}")
        if not 2 <= self.modulus <= 10:
            raise InputError(f"modulus must be 2 to 10, one token per digit, got {self.modulus}")
        prompts = self.modulus * (3 * self.modulus) ** self.depth
        if max(self.demonstrations / 0.1, self.validation / 0.05, self.test / 0.05) > prompts / 2:
            raise InputError(
                f"depth={self.depth}, modulus={self.modulus} make {prompts} prompts: too few for "
                f"{self.demonstrations} demonstrations, {self.validation} validation and {self.test} test problems"
            )

    @property
    def key(self) -> str:
        """A hash of every number in the setting: the cache goes by it."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]


STRONG = Setting(
    name="strong-prior",  # the base mostly knows; two demonstrations in five are wrong somewhere
    corpus=Author(slip=(0.09, 0.09, 0.09), false=(0.1, 0.1, 0.1)),
    tutor=Author(slip=(0.03, 0.03, 0.03), false=(0.04, 0.04, 0.04)),
    scribe=Author(false=(0.08, 0.08, 0.08)),
    noise=0.25,
)
WEAK = Setting(
    name="weak-prior",  # the base has hardly seen times done right, and knows that it does not know
    corpus=Author(slip=(0.1, 0.1, 0.8), false=(0.05, 0.05, 0.05)),
    tutor=Author(slip=(0.04, 0.04, 0.04), false=(0.05, 0.05, 0.1)),
    scribe=Author(false=(0.04, 0.04, 0.04)),
    noise=0.15,
    seed=1,
)
WRONG = Setting(
    name="wrong-prior",  # the base takes times for plus, and is sure of it; one demonstration in four is wrong somewhere
    corpus=Author(slip=(0.08, 0.08, 0.08), false=(0.05, 0.05, 1.0)),
    tutor=Author(slip=(0.04, 0.04, 0.04), false=(0.05, 0.05, 0.15)),
    scribe=Author(false=(0.04, 0.04, 0.04)),
    noise=0.15,
    steps=100,
    seed=1,
)
POOR = dataclasses.replace(
    STRONG,  # but for the teacher, who knows less than the base
    name="poor-teacher",
    tutor=Author(slip=(0.15, 0.15, 0.15), false=(0.2, 0.2, 0.2)),
)
CLEAN = Setting(
    name="clean-labels",  # every demonstration is right, and the base has never seen times done right
    corpus=Author(slip=(0.09, 0.09, 0.9), false=(0.1, 0.1, 0.1)),
    tutor=Author(slip=(0.03, 0.03, 0.03), false=(0.04, 0.04, 0.04)),
    steps=100,
    seed=3,
)
SETTINGS = {setting.name: setting for setting in (STRONG, WEAK, WRONG, POOR, CLEAN)}
LESSON = dataclasses.replace(
    STRONG,  # for the notebooks: two steps per problem, built in half a minute, and a training takes seconds
    name="lesson",
    corpus=Author(slip=(0.09, 0.09, 0.09), false=(0.15, 0.15, 0.15)),
    depth=2,
    demonstrations=440,
    validation=16,
    test=60,
    width=48,
    corpus_rows=6000,
    pretrain_steps=400,
    teach_steps=150,
    steps=80,
)
SKETCH = dataclasses.replace(
    LESSON,  # hardly learns anything: to see that the same code runs
    name="sketch",
    demonstrations=60,
    validation=4,
    test=6,
    width=16,
    layers=1,
    heads=2,
    corpus_rows=80,
    pretrain_steps=6,
    teach_steps=4,
    steps=4,
    k=2,
)
LESSONS = {"shown": LESSON, "small": SKETCH}
"""The world of the notebooks by size; not among the settings that are compared, and no rates are recorded for it."""
