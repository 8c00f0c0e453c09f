"""Draw the figures of README and notebooks: ``python -m qlens.analysis.maintenance.readme_figures --out DIR``.

Without options they show built-in probes, the embedded lab and the stored studies, offline; with ``--model``, ``--teacher``
and ``--data``, figures of real tokens show your own.
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
from qlens.data.rows import load_rows
from qlens.lab import SETTINGS
from qlens.lab import world as lab_world
from qlens.lens.equivalences import distances
from qlens.registry import names
from qlens.training.fitting import fit
from qlens.training.watch import Watch

DPI = 160
METHODS = ("sft", "dft", "kd", "target_sft", "gem")
ROWS, HELD_OUT, TOKENS = 256, 24, 40  # rows to train on, rows to read, and tokens of the text shown
SHOWN_P_Y = 0.1  # p_y of the token shown
FIELDS = ("old", "second", "negatives")
SETTING = replace(SETTINGS["strong-prior"], name="gallery", pretrain_steps=600, teach_steps=250)  # quick to build
RESULTS = Path(__file__).parents[1] / "results"
STUDY = RESULTS / "compare-all"


@dataclass(frozen=True, eq=False)
class Material:
    """Models and text behind the figures of real tokens."""

    model: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: list[dict[str, list[int]]]
    learning_rate: float

    @classmethod
    def lab(cls) -> "Material":
        """A small lab environment with noisy labels and a good teacher, built on first use."""
        world = lab_world(SETTING)
        pairs = [
            {"prompt": each.prompt, "completion": each.completion} for each in world.demonstrations[: ROWS + HELD_OUT]
        ]
        examples = encode(pairs, world.tokenizer, progress=False).examples
        return cls(world.base(), world.teacher(), world.tokenizer, examples, world.setting.learning_rate)

    @classmethod
    def own(cls, model: str, teacher: str, data: str) -> "Material":
        """Models from folders, and rows from a JSON Lines file.

        Raises:
            InputError: unreadable files, different tokenizers, or fewer than two rows that fit.
        """
        tokenizer = load_tokenizer(model)
        check_same_tokenizer(tokenizer, load_tokenizer(teacher))
        student, other = load_model(model), load_model(teacher)
        examples = encode(load_rows(data), tokenizer, shortest_context(student, other)).examples[: ROWS + HELD_OUT]
        if len(examples) < 2:
            raise InputError(
                f"data {data}: 2 rows or more are needed, one to read and one to train on, got {len(examples)}"
            )
        return cls(student, other, tokenizer, examples, 1e-3)

    @property
    def held_out(self) -> list[dict[str, list[int]]]:
        """Rows that are read, and not trained on."""
        return self.examples[: min(HELD_OUT, len(self.examples) // 2)]

    @cached_property
    def tokens(self) -> Tokens:
        """Tokens of the held-out rows; the reference is the student."""
        models = {"teacher": self.teacher, "reference": self.model}
        return tokens_from_examples(self.model, self.held_out, needs=FIELDS, **models)


Source = Callable[[], Material]
Picture = tuple[Figure, pd.DataFrame | dict[str, pd.DataFrame]]


def forgotten_detach(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The example of the README: -p_y log p_y, where p_y should be detached."""
    log_p = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return -(log_p.exp() * log_p).mean()


def _explain(source: Source) -> Picture:
    explanation = qlens.explain(forgotten_detach)
    return explanation.plot(), plots.explain_data(explanation)


def _sweep(source: Source) -> Picture:
    data = plots.sweep_frame(("sft", "dft", "target_sft", "gem"))
    return plots.figure_sweep(data), data


def _token(source: Source) -> Picture:
    material = source()
    tokens = material.tokens
    unlikely = (tokens.log_probs.argmax(-1) != tokens.labels).nonzero()[:, 0].tolist() or range(len(tokens))
    i = min(unlikely, key=lambda row: abs(float(tokens.label_probs[row]) - SHOWN_P_Y))
    data = plots.token_frame(METHODS, tokens, i, token_text=material.tokenizer)
    return plots.figure_token(data), data


def _sequence(source: Source) -> Picture:
    material = source()
    data = plots.text_frame(METHODS, material.tokens[:TOKENS], token_text=material.tokenizer)
    return plots.figure_sequence(data), data


def _plane(source: Source) -> Picture:
    material = source()
    tokens = material.tokens
    methods = [name for name in names() if all(getattr(tokens, need) is not None for need in qlens.get(name).needs)]
    data = plots.plane_frame(methods, tokens)
    return plots.figure_plane(data), data


def _atlas(source: Source) -> Picture:
    angles = distances().angles()
    return plots.figure_atlas(angles), angles.reset_index()


def _settings(source: Source) -> Picture:
    study = Study.load(STUDY)
    return plots.figure_settings(study), study.table()


def _forest(source: Source) -> Picture:
    study = Study.load(STUDY)
    return plots.figure_forest(study), study.differences()


def _scores(source: Source) -> Picture:
    study = Study.load(RESULTS / "compare-default")
    return plots.figure_study(study, ("scores",)), plots.panel_data(study, "scores")


def _calibration(source: Source) -> Picture:
    study = Study.load(STUDY)
    return plots.figure_study(study, ("calibration",)), plots.panel_data(study, "calibration")


def _watch(source: Source, steps: int = 120) -> Picture:
    material = source()
    options: dict[str, Any] = {"tokenizer": material.tokenizer, "teacher": material.teacher, "every": 20, "tokens": 40}
    watch = Watch(METHODS, material.held_out, **options)
    training: dict[str, Any] = {"steps": steps, "batch_size": 16, "learning_rate": material.learning_rate, "seed": 0}
    training |= {"variant": "target_sft", "teacher": material.teacher, "callbacks": [watch]}
    fit(deepcopy(material.model), material.examples[len(material.held_out) :], **training)
    return watch.plot(), watch.frame


PICTURES: dict[str, tuple[Callable[[Source], Picture], str]] = {
    "explain": (_explain, "a loss with a forgotten detach against p_y, and its gradient flow"),
    "sweep": (_sweep, "gradient and target of four losses against p_y"),
    "token": (_token, "one token: p, the update of its logits, Q"),
    "sequence": (_sequence, "a text: label weight, entropy, KL(Q || p) and negative mass of every target"),
    "plane": (_plane, "methods by label weight and reshape, on real tokens"),
    "atlas": (_atlas, "methods by the angle between their gradients"),
    "settings": (_settings, "five settings of the lab on one axis"),
    "forest": (_forest, "differences from SFT, paired by seed and problem"),
    "scores": (_scores, "scores of the default comparison"),
    "calibration": (_calibration, "share of correct labels against trust"),
    "watch": (_watch, "targets during training with Target-SFT"),
}
"""Figures by name: the function that draws it, and a caption."""


def build(
    out: str | Path,
    material: Source = Material.lab,
    only: Sequence[str] = (),
) -> list[Path]:
    """Draw the figures, each with its data as CSV beside it.

    Args:
        out: the folder, created if needed.
        material: makes the models and text; called once, by the first figure of real tokens.
        only: names of ``PICTURES``; by default all.

    Returns:
        the paths of the figures.

    Raises:
        InputError: an unknown name, or unreadable models or data.
    """
    if unknown := sorted(set(only) - set(PICTURES)):
        raise InputError(f"only: no picture is called {unknown[0]!r}; there are {', '.join(PICTURES)}")
    folder, paths, source, console = Path(out), [], cache(material), Console(stderr=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in only or PICTURES:
        draw, caption = PICTURES[name]
        figure, data = draw(source)
        frames = data if isinstance(data, dict) else {"": data}
        paths.append(folder / f"{name}.png")
        plots.save_figure(figure, paths[-1], {key: frame.map(_rounded) for key, frame in frames.items()}, DPI)
        console.print(f"{paths[-1]}: {caption}")
    return paths


def _rounded(cell: Any) -> Any:
    """Numbers at six significant digits."""
    return float(f"{cell:.6g}") if isinstance(cell, float) else cell


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m qlens.analysis.maintenance.readme_figures", description=__doc__)
    parser.add_argument("--out", default="notebooks/figures", help="folder (notebooks/figures)")
    parser.add_argument("--only", default="", help=f"names, comma-separated ({', '.join(PICTURES)})")
    for name, text in (("model", "a Hugging Face folder"), ("teacher", "another"), ("data", "a JSON Lines file")):
        parser.add_argument(f"--{name}", help=text)
    options = parser.parse_args(argv)
    own = (options.model, options.teacher, options.data)
    if any(own) and not all(own):
        parser.error("--model, --teacher and --data go together")
    try:
        material = (lambda: Material.own(*own)) if all(own) else Material.lab
        build(options.out, material, [name for name in options.only.split(",") if name])
    except InputError as error:
        sys.exit(f"readme_figures: {error}")


if __name__ == "__main__":
    main()
