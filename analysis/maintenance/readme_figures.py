"""The pictures that README and notebooks show, rebuilt by one command: ``python -m
qlens.analysis.maintenance.readme_figures --out DIR``.

Without options they are made from built-in probes, the embedded lab and the kept studies, offline; with ``--model``,
``--teacher`` and ``--data``, those about real tokens from your own.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import qlens
from qlens.analysis import plots
from qlens.analysis.study.study import Study
from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.data.compatibility import check_same_tokenizer, shortest_context
from qlens.data.examples import encode
from qlens.data.from_text import tokens_from_examples
from qlens.data.models import load_model, load_tokenizer
from qlens.data.rows import read_rows
from qlens.lab import SETTINGS
from qlens.lab import world as lab_world
from qlens.lens.equivalences import distances
from qlens.registry import names
from qlens.training.fitting import fit
from qlens.training.watch import Watch

DPI = 160
METHODS = ("sft", "dft", "kd", "target_sft", "gem")
WATCHED = METHODS
ROWS, HELD, TOKENS = 256, 24, 40  # rows to train on and to read, and tokens of the text that is shown
DOUBTED = 0.1  # the p_y of the token that is shown
FOUND = ("old", "second", "negatives")
# built in half the time of its parent
SETTING = replace(SETTINGS["strong-prior"], name="gallery", pretrain_steps=600, teach_steps=250)
KEPT = Path(__file__).parents[1] / "results"
STUDY = KEPT / "compare-all"


@dataclass(frozen=True, eq=False)
class Material:
    """Real tokens: a student, a teacher, and encoded rows to train on and to read."""

    model: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: list[dict[str, list[int]]]
    learning_rate: float

    @classmethod
    def lab(cls) -> "Material":
        """A small world of the lab, with noisy labels and a good teacher; built on first use."""
        world = lab_world(SETTING)
        pairs = [{"prompt": each.prompt, "completion": each.completion} for each in world.demonstrations[: ROWS + HELD]]
        examples = encode(pairs, world.tokenizer, None).examples
        return cls(world.base(), world.teacher(), world.tokenizer, examples, world.setting.learning_rate)

    @classmethod
    def own(cls, model: str, teacher: str, data: str) -> "Material":
        """A student, a teacher and rows of one's own, from folders and a JSON Lines file.

        Raises:
            InputError: what cannot be read, two tokenizers, or fewer than two rows that fit.
        """
        tokenizer = load_tokenizer(model)
        check_same_tokenizer(tokenizer, load_tokenizer(teacher))
        student, other = load_model(model), load_model(teacher)
        examples = encode(read_rows(data), tokenizer, shortest_context(student, other)).examples[: ROWS + HELD]
        if len(examples) < 2:
            raise InputError(
                f"data {data}: 2 rows or more are needed, one to read and one to train on, got {len(examples)}"
            )
        return cls(student, other, tokenizer, examples, 1e-3)

    @property
    def held(self) -> list[dict[str, list[int]]]:
        """The rows that are read, and not trained on."""
        return self.examples[: min(HELD, len(self.examples) // 2)]

    @cached_property
    def tokens(self) -> Tokens:
        """The held rows' tokens, as student and teacher see them; the reference is the student, as training begins."""
        models = {"teacher": self.teacher, "reference": self.model}
        return tokens_from_examples(self.model, self.held, needs=FOUND, **models)

    def piece(self, token: int) -> str:
        """The text of a token; its piece where that alone is no text."""
        return self.tokenizer.decode([token]) or self.tokenizer.convert_ids_to_tokens(token)


Asked = Callable[[], Material]
Picture = tuple[Figure, pd.DataFrame | dict[str, pd.DataFrame]]


def forgotten_detach(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """README's example: the likelihood weighted by the label's probability, which carries its own gradient."""
    log_p = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return -(log_p.exp() * log_p).mean()


def _explain(asked: Asked) -> Picture:
    read = qlens.explain(forgotten_detach)
    return read.plot(), plots.explain_data(read)


def _sweep(asked: Asked) -> Picture:
    data = plots.sweep(("sft", "dft", "target_sft", "gem"))
    return plots.figure_sweep(data), data


def _token(asked: Asked) -> Picture:
    material = asked()
    tokens = material.tokens
    doubted = (tokens.log_probs.argmax(-1) != tokens.labels).nonzero()[:, 0].tolist() or range(len(tokens))
    at = min(doubted, key=lambda row: abs(float(tokens.label_probs[row]) - DOUBTED))
    data = plots.candidates(METHODS, tokens, at, pieces=material.piece)
    return plots.figure_token(data, across=len(METHODS)), data


def _sequence(asked: Asked) -> Picture:
    material = asked()
    data = plots.along(METHODS, material.tokens[:TOKENS], pieces=material.piece)
    return plots.figure_sequence(data), data


def _plane(asked: Asked) -> Picture:
    material = asked()
    tokens = material.tokens
    fed = [name for name in names() if all(getattr(tokens, need) is not None for need in qlens.get(name).needs)]
    data = plots.plane(fed, tokens)
    return plots.figure_plane(data), data


def _atlas(asked: Asked) -> Picture:
    angles = distances().angles()
    return plots.figure_atlas(angles), angles.reset_index()


def _settings(asked: Asked) -> Picture:
    study = Study.load(STUDY)
    return plots.figure_settings(study), study.table()


def _forest(asked: Asked) -> Picture:
    study = Study.load(STUDY)
    return plots.figure_forest(study), study.differences()


def _scores(asked: Asked) -> Picture:
    study = Study.load(KEPT / "compare-default")
    return plots.figure_study(study, ("scores",)), plots.panel_data(study, "scores")


def _truth(asked: Asked) -> Picture:
    study = Study.load(STUDY)
    return plots.figure_study(study, ("truth",)), plots.panel_data(study, "truth")


def _watch(asked: Asked, steps: int = 120) -> Picture:
    material = asked()
    options: dict[str, Any] = {"tokenizer": material.tokenizer, "teacher": material.teacher, "every": 20, "tokens": 40}
    watch = Watch(WATCHED, material.held, **options)
    given: dict[str, Any] = {"steps": steps, "batch_size": 16, "learning_rate": material.learning_rate, "seed": 0}
    given |= {"variant": "target_sft", "teacher": material.teacher, "callbacks": [watch]}
    fit(deepcopy(material.model), material.examples[len(material.held) :], **given)
    return watch.plot(), watch.frame


PICTURES: dict[str, tuple[Callable[[Asked], Picture], str]] = {
    "explain": (_explain, "what a loss with a forgotten detach teaches against p_y, and where it ends"),
    "sweep": (_sweep, "gradient and target of four losses against p_y"),
    "token": (_token, "one token: p, the update of its logits, Q"),
    "sequence": (_sequence, "a text: trust, entropy, KL(Q || p) and negative mass of every token"),
    "plane": (_plane, "methods by effective trust and reshape, on real tokens"),
    "atlas": (_atlas, "methods by the angle between their gradients"),
    "settings": (_settings, "five settings of the lab on one axis"),
    "forest": (_forest, "differences from SFT, paired by seed and problem"),
    "scores": (_scores, "what the default comparison gave"),
    "truth": (_truth, "the share of right labels among those that a method trusts alike"),
    "watch": (_watch, "how targets move while Target-SFT trains"),
}
"""Every picture: what makes it, and what it shows."""


def build(
    out: str | Path,
    material: Asked = Material.lab,
    only: Sequence[str] = (),
    say: Console | None = None,
) -> list[Path]:
    """Make the pictures, each with its data as CSV beside it; returns their paths.

    Args:
        out: the folder; made where it is not there.
        material: what gives the real tokens, asked once, and only for pictures that show some.
        only: names of ``PICTURES``; by default all.
        say: where progress is told.

    Raises:
        InputError: an unknown name, or material that cannot be read.
    """
    if unknown := sorted(set(only) - set(PICTURES)):
        raise InputError(f"only: no picture is called {unknown[0]!r}; there are {', '.join(PICTURES)}")
    folder, made, asked = Path(out), [], cache(material)
    folder.mkdir(parents=True, exist_ok=True)
    for name in only or PICTURES:
        make, shows = PICTURES[name]
        figure, data = make(asked)
        frames = data if isinstance(data, dict) else {"": data}
        made.append(folder / f"{name}.png")
        plots.save_figure(figure, made[-1], {key: frame.map(_digits) for key, frame in frames.items()}, DPI)
        (say or Console(stderr=True)).print(f"{made[-1]}: {shows}")
    return made


def _digits(cell: Any) -> Any:
    """Six significant digits are more than a figure shows."""
    return float(f"{cell:.6g}") if isinstance(cell, float) else cell


def main(argv: list[str] | None = None) -> None:
    """Rebuild the pictures."""
    parser = argparse.ArgumentParser(prog="python -m qlens.analysis.maintenance.readme_figures", description=__doc__)
    parser.add_argument("--out", default="notebooks/figures", help="folder (notebooks/figures)")
    parser.add_argument("--only", default="", help=f"names, comma-separated ({', '.join(PICTURES)})")
    for name, said in (("model", "a Hugging Face folder"), ("teacher", "another"), ("data", "a JSON Lines file")):
        parser.add_argument(f"--{name}", help=said)
    options = parser.parse_args(argv)
    own = (options.model, options.teacher, options.data)
    if any(own) and not all(own):
        parser.error("--model, --teacher and --data go together")
    try:
        material = (lambda: Material.own(*own)) if all(own) else Material.lab
        build(options.out, material, [name for name in options.only.split(",") if name])
    except InputError as error:
        sys.exit(f"gallery: {error}")


if __name__ == "__main__":
    main()
