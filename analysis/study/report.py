"""The run folder and its report: tables, figures with their data, and one HTML page that needs nothing else."""

import base64
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

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
    "line is the start.",
    "differences": "Differences against one method, paired by seed and item, with their single 95 % intervals. Filled: p "
    "below .05 after Holm's correction over all methods and settings.",
    "frontier": "Score against KL(start || trained) per held-out token, in nats: what a method's result costs in distance.",
    "curves": "Scores in the course of training, on problems that the table's scores do not come from (on your own data: "
    "the held-out rows); bands: 95 % intervals over seeds.",
    "truth": "For tokens whose label is known to be right or wrong: the share of right labels among those trusted alike, "
    "at the starting model. On the diagonal, trust is the chance that a label is right. AUROC: the chance that a right "
    "label is trusted more than a wrong one.",
    "trust": "How far each method pulls toward the label (1: plain SFT, the grey line; p_y: the dashed line), on "
    "held-out tokens of the starting model, the same tokens for every method.",
    "target": "What each method wants one token to become. Pale: the starting model. Bold: the observed label. The "
    "token is chosen without a look at results: of those whose label is not the model's favourite, the one with p_y "
    "nearest to 0.1.",
}
READING = (
    "n is seeds x items. The interval of a score holds for new seeds and new items, and is not corrected for the number of "
    "methods; p (Holm) is, over all methods and settings. rank: of the mean, with the ranks that cannot be excluded, all "
    "methods of a setting at once at the 95 % level.",
    "Every method starts from the same model and sees the same batches in the same order at one seed; samples are drawn "
    f"with the same seed. rate: from one grid for all, by one rule on validation problems: {RULE}.",
    "trust: how hard labels are pulled as a share of SFT's pull, sum(-g_y) / sum(1 - p_y); off simplex: mean mass that Q "
    "has below zero; KL from start: mean KL(start || trained) per token, in nats. All on held-out tokens, at the trained "
    "model.",
    "Trust against truth: trust is the label's coefficient in the method's own construction (- for a loss whose "
    "construction is not known), Q(label) and p(label) what target (at unit scale) and model give it. start, end: at the "
    "starting and at the trained model.",
    "poor-teacher has strong-prior's base, demonstrations and problems, wrong-prior has weak-prior's demonstrations and "
    "problems: methods without a teacher give the same numbers in strong-prior and poor-teacher.",
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #6b6b70; --line: #dcdce0; --paper: #ffffff; --card: #f6f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --soft: #a0a0a8; --line: #3a3a40; --paper: #17171a; --card: #212126; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p, li, figcaption { color: var(--soft); font-size: .92rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; min-width: 34rem; width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
figure { margin: 1.2rem 0; } img { width: 100%; height: auto; background: #fff; border-radius: 6px; padding: .4rem; }
pre { background: var(--card); padding: .8rem; border-radius: 6px; overflow-x: auto; font-size: .8rem; }
summary { cursor: pointer; margin-top: 1rem; }
"""


def save(study: Study, folder: Path) -> None:
    """Write config.json, the frames as CSV, table.md, figures/*.png with a CSV beside each, and report.html."""
    make_folder(folder / "figures", "folder")
    for name, file in FILES.items():
        write_text(folder / file, getattr(study, name).to_csv(index=False))
    write_text(folder / "table.md", study.to_markdown())
    figures = {}
    for name in panels(study):
        figures[name] = save_figure(
            figure_study(study, (name,)), folder / f"figures/{name}.png", panel_data(study, name)
        )
    write_text(folder / "report.html", html(study, figures))
    write_json(folder / "config.json", study.config)


def panels(study: Study) -> list[str]:
    """The figures there is something to draw in: without a variant, there are no targets."""
    return [name for name in PANELS if len(panel_data(study, name))]


def html(study: Study, figures: dict[str, bytes]) -> str:
    """The report as one self-contained page; everything from model, data or user is escaped."""
    title, noted = f"qlens compare: {', '.join(study.settings)}", study.config.get("noted", {})
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(_summary(study))}</p>"]
    if failed := noted.get("failed"):
        body += ["<h2>Failed</h2>", _list(failed)]
    for heading, cells, said in blocks(study):
        body += [f"<h2>{escape(heading)}</h2>", _table(cells), _list(said)]
    for name, image in figures.items():
        data = base64.b64encode(image).decode()
        picture = f'<img alt="{name}: {escape(CAPTIONS[name])}" src="data:image/png;base64,{data}">'
        body.append(f"<figure>{picture}<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>")
    if controls := [name for name in study.methods if name in CONTROLS]:
        body += ["<h2>Controls</h2>", _list(f"{name}: {CONTROLS[name].says}" for name in controls)]
    body += ["<h2>How to read it</h2>", _list(READING), "<h2>Settings as measured</h2>", _table(_measured(noted))]
    body += [
        "<h2>Configuration</h2>",
        _details(
            "settings, rates, seeds and methods",
            {k: v for k, v in study.config.items() if k not in ("noted", "versions")},
        ),
        _details("versions", study.config["versions"]),
    ]
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))


def _measured(noted: Mapping[str, Any]) -> pd.DataFrame:
    """A row per setting, a column per figure."""
    frame = pd.DataFrame(noted.get("settings", {})).T
    words = {name: told for sense in MEASURED.values() for name, told in sense.items()}
    return frame.rename(columns=words).rename_axis("setting").reset_index().fillna("-")


def _summary(study: Study) -> str:
    methods, seeds, version = study.config["methods"], study.config["seeds"], study.config["versions"]["qlens-sft"]
    counted = f"{len(methods)} methods, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return f"{counted}, qlens {version}, code {study.config['code']}."


def _table(frame: pd.DataFrame) -> str:
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in frame.columns)
    rows = "".join(f"<tr>{_cells(row)}</tr>" for row in frame.itertuples(index=False))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cells(row: Iterable[Any]) -> str:
    return "".join(f"<td>{escape(str(cell))}</td>" for cell in row)


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _details(summary: str, content: Any) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(json.dumps(content, indent=1))}</pre></details>"
