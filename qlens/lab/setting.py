"""Settings: the numbers that define an environment of the lab.

How the numbers were chosen: by the accuracies of the base model, of the teacher and of SFT on the validation problems at
the learning rates 1e-3, 3e-3 and 1e-2; no other method was run before the numbers were fixed. All three lie between .1 and
.9 in every setting. Demonstrations and teacher both have false facts of their own, so that learning the most frequent digit
is not enough. Tried and dropped:

- weak-prior with ``times`` at slip .9: SFT at .36, too low to separate methods; at slip .7, SFT (.76) above the teacher
  (.75). Its first version, whose base model takes ``times`` for ``plus`` with confidence, is now wrong-prior.
- poor-teacher with a ``tutor`` slip of .25: a teacher at .25. It now differs from strong-prior in ``tutor`` alone.
- clean-labels with the base model of strong-prior: SFT at .98.

wrong-prior has the demonstrations and problems of weak-prior; poor-teacher has those of strong-prior and its base model,
so that methods without a teacher give the same numbers in the two.

``steps`` is 150; 100 for wrong-prior, where SFT reaches the share of right answers among the demonstrations at 150, and for
clean-labels. ``learning_rate`` is used by settings without a search; the rates of the settings here were searched alike for
every method (``qlens.analysis.compare.learning_rates``) and are recorded in ``rates.json``.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass

from qlens.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """An annotator of solutions: random slips, false facts and preferred wordings.

    Args:
        slip: for plus, minus and times, the probability that a step gets a random wrong digit, from which the solution
            continues. At (modulus - 1) / modulus all digits are equally likely.
        false: for plus, minus and times, the share of facts "a op b" that are always computed by the next of the three
            operations.
        wording: concentration of the Dirichlet distribution over the wordings of a phrase; large: used evenly.
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
    """An environment of the lab as numbers, from which everything else is derived.

    Args:
        name: of the setting.
        corpus: annotator of the corpus that the base model is pretrained on.
        tutor: annotator of the corpus that the teacher, a copy of the base model, is trained on further.
        scribe: annotator of the demonstrations.
        noise: share of the demonstrations with one more error: a random digit in a step, carried on, or in the answer.
        depth: steps per problem.
        modulus: 2 to 10; all arithmetic is modulo it.
        demonstrations, validation, test: how many of each.
        width, layers, heads: of the models.
        corpus_rows: rows of either corpus; pretrain_steps, pretrain_rate, teach_steps, teach_rate,
            pretrain_batch: training of base model and teacher.
        steps, batch_size, learning_rate: of every fine-tuning; ``k``: samples per problem.
        seed: of all random draws.

    Raises:
        InputError: numbers outside their ranges, or too few distinct prompts.
    """

    name: str
    corpus: Annotator
    tutor: Annotator
    scribe: Annotator = Annotator()
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
        """A hash of all numbers, which names the cache folder."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]


STRONG = Setting(
    name="strong-prior",  # the base model is mostly right; two demonstrations in five have an error
    corpus=Annotator(slip=(0.09, 0.09, 0.09), false=(0.1, 0.1, 0.1)),
    tutor=Annotator(slip=(0.03, 0.03, 0.03), false=(0.04, 0.04, 0.04)),
    scribe=Annotator(false=(0.08, 0.08, 0.08)),
    noise=0.25,
)
WEAK = Setting(
    name="weak-prior",  # the base model has seen few correct multiplications
    corpus=Annotator(slip=(0.1, 0.1, 0.8), false=(0.05, 0.05, 0.05)),
    tutor=Annotator(slip=(0.04, 0.04, 0.04), false=(0.05, 0.05, 0.1)),
    scribe=Annotator(false=(0.04, 0.04, 0.04)),
    noise=0.15,
    seed=1,
)
WRONG = Setting(
    name="wrong-prior",  # the base model takes times for plus, with confidence; one demonstration in four has an error
    corpus=Annotator(slip=(0.08, 0.08, 0.08), false=(0.05, 0.05, 1.0)),
    tutor=Annotator(slip=(0.04, 0.04, 0.04), false=(0.05, 0.05, 0.15)),
    scribe=Annotator(false=(0.04, 0.04, 0.04)),
    noise=0.15,
    steps=100,
    seed=1,
)
POOR = dataclasses.replace(
    STRONG,  # with a teacher below the base model
    name="poor-teacher",
    tutor=Annotator(slip=(0.15, 0.15, 0.15), false=(0.2, 0.2, 0.2)),
)
CLEAN = Setting(
    name="clean-labels",  # every demonstration is correct; the base model has seen no correct multiplication
    corpus=Annotator(slip=(0.09, 0.09, 0.9), false=(0.1, 0.1, 0.1)),
    tutor=Annotator(slip=(0.03, 0.03, 0.03), false=(0.04, 0.04, 0.04)),
    steps=100,
    seed=3,
)
SETTINGS = {setting.name: setting for setting in (STRONG, WEAK, WRONG, POOR, CLEAN)}
LESSON = dataclasses.replace(
    STRONG,  # for the notebooks: built in half a minute, trained in seconds
    name="lesson",
    corpus=Annotator(slip=(0.09, 0.09, 0.09), false=(0.15, 0.15, 0.15)),
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
    LESSON,  # runs the same code in seconds, without learning
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
"""Settings of the notebooks by size; they have no recorded learning rates."""
