"""The run folder of a study and its report: tables, figures with their data, and one self-contained HTML page."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader

from qlens.analysis.compare.learning_rates import RULE
from qlens.analysis.compare.recipes import CONTROLS
from qlens.analysis.plots import PANELS, figure_study, panel_data
from qlens.analysis.plots.save import save_figure
from qlens.analysis.study.study import FILES, Study
from qlens.analysis.study.tables import MEASURED, blocks
from qlens.core.files import make_folder, write_json, write_text

CAPTIONS = {
    "settings": "All settings on one axis: means with 95 % intervals over seeds and items.",
    "scores": "Means with 95 % intervals over seeds and items (two-way random effects, t, Satterthwaite). The dashed "
    "line is the starting model.",
    "differences": "Differences from one method, paired by seed and item, with their single 95 % intervals. Filled: p "
    "below .05 after Holm's correction over all methods and settings.",
    "frontier": "Score against KL(start || trained) per held-out token, in nats: the distance from the start that a "
    "result costs.",
    "curves": "Scores during training on the validation problems, from half of the samples per problem (on user data: the "
    "held-out rows); bands: 95 % intervals over seeds.",
    "calibration": "Reliability of trust at the starting model, on tokens whose label is known to be correct or wrong: the "
    "share of correct labels in bins of trust. On the diagonal, trust is the probability that a label is correct. "
    "AUROC: the probability that a correct label has more trust than a wrong one.",
    "label_weight": "Label weight -g_y / (1 - p_y) on held-out tokens of the starting model, the same tokens for every "
    "method: 1 is SFT (grey line), p_y is DFT (dashed).",
    "target": "Target of each method at one token. Pale: the starting model. Bold: the observed label. The token is chosen "
    "before any result: of those whose label is not the model's most likely token, the one with p_y nearest to 0.1.",
}
EXPLANATIONS = (
    "n is seeds x items. The interval of a score holds for new seeds and new items, and is not corrected for the number of "
    "methods; p (Holm) is, over all methods and settings. rank: of the mean, with the ranks that cannot be excluded, all "
    "methods of a setting at once at the 95 % level.",
    "Every method starts from the same model and sees the same batches in the same order at one seed; samples are drawn "
    f"with the same seed. learning rate: from one grid for all, by one rule on validation problems: {RULE}.",
    "label weight: sum(-g_y) / sum(1 - p_y), the gradient on the labels as a share of SFT's (g: the logit gradient); negative "
    "mass: mean mass of Q below zero; KL from start: mean KL(start || trained) per token, in nats. All on held-out "
    "tokens of the trained model.",
    "Label noise: trust is the label's coefficient in the method's own construction of Q (- for a loss without one), "
    "Q(label) and p(label) the label's probability under target (unit scale) and model; start, end: before and after "
    "training.",
    "poor-teacher has strong-prior's base, demonstrations and problems, wrong-prior has weak-prior's demonstrations and "
    "problems: methods without a teacher give the same numbers in strong-prior and poor-teacher.",
)


def save(study: Study, folder: Path) -> None:
    """Write config.json, the frames as CSV, table.md, figures (PNG and PDF, with a CSV each) and report.html."""
    make_folder(folder / "figures", "folder")
    for name, file in FILES.items():
        write_text(folder / file, getattr(study, name).to_csv(index=False))
    write_text(folder / "table.md", study.to_markdown())
    figures = {}
    for name in panels(study):
        figure, data = figure_study(study, (name,)), panel_data(study, name)
        save_figure(figure, folder / f"figures/{name}.pdf", data)
        figures[name] = save_figure(figure, folder / f"figures/{name}.png", data)
    write_text(folder / "report.html", html(study, figures))
    write_json(folder / "config.json", study.config)


def panels(study: Study) -> list[str]:
    """The panels with data; without a trained variant there are no targets."""
    return [name for name in PANELS if len(panel_data(study, name))]


def html(study: Study, figures: Mapping[str, bytes]) -> str:
    """The report as one self-contained page; everything from model, data or user is escaped.

    Args:
        study: what to report.
        figures: PNG files by the name of their panel.
    """
    metadata, versions = study.config.get("noted", {}), study.config["versions"]
    config = {key: value for key, value in study.config.items() if key not in ("noted", "versions")}
    seeds = len(study.config["seeds"])
    counts = f"{len(study.config['methods'])} methods, {seeds} seed{'s' * (seeds > 1)}"
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html.j2").render(
        title=f"qlens compare: {', '.join(study.settings)}",
        summary=f"{counts}, qlens {versions['qlens-sft']}, code {study.config['code']}.",
        failed=metadata.get("failed", []),
        blocks=list(blocks(study)),
        figures=[(name, base64.b64encode(image).decode()) for name, image in figures.items()],
        captions=CAPTIONS,
        controls=[f"{name}: {CONTROLS[name].says}" for name in study.methods if name in CONTROLS],
        explanations=EXPLANATIONS,
        measured=_measured(metadata),
        configuration=[
            ("settings, learning rates, seeds and methods", json.dumps(config, indent=1)),
            ("versions", json.dumps(versions, indent=1)),
        ],
    )


def _measured(metadata: Mapping[str, Any]) -> pd.DataFrame:
    """A row per measurement, a column per setting."""
    frame = pd.DataFrame(metadata.get("settings", {}))
    words = {name: f"{subject}: {text}" for subject, texts in MEASURED.items() for name, text in texts.items()}
    measurements = [name for name in words if name in frame.index]
    frame = frame.loc[[*measurements, *frame.index.difference(measurements, sort=False)]]
    return frame.rename(index=words).rename_axis("measurement").reset_index().fillna("-")
