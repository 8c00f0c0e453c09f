"""HTML page of a token view: data, style and script in one file, with a policy that forbids everything else."""

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Template

from qlens.analysis.ranking.orders import NEGATIVE_MARGIN
from qlens.analysis.token_view.segments import REST
from qlens.analysis.token_view.summary import Summary
from qlens.analysis.token_view.token_text import completed

HERE = Path(__file__).parent
TEMPLATE, STYLE, SCRIPT = "view.html", ("view.css",), ("view_text.js", "view_panel.js", "view_lists.js", "view.js")
LISTED = 30  # tokens in the list of the first of an order
ENTRIES = 15  # promoted, and demoted, entries of the vocabulary table
DROPPED = np.uint32(11)  # bits of the mantissa: numbers keep four digits and compress to half the size
TYPICAL = 0.98  # share of the values within the colour scale of an unbounded metric


class Metric(NamedTuple):
    """A metric to colour the text by: its column in the summary, its name and its definition."""

    key: str
    name: str
    says: str
    method: bool  # of a method's target, not of the models alone
    high: float | None = None  # upper bound; None: unbounded
    signed: bool = False
    log: bool = False  # a rank, from 1, coloured by its logarithm


MARGIN = "log p of the runner-up minus log p of the label, nats; the smaller of student's and teacher's"
METRICS = (
    Metric("supervised", "trained on", "tokens that the loss is computed on; the others are context", False, 2.5),  # pale
    Metric("label_weight", "label weight", "gradient on the label as a share of SFT's, -g_y / (1 - p_y)", True, 1.0, True),
    Metric("q_other", "Q(other)", "1 - Q_y: the target's mass that is not on the label", True, 1.0, True),
    Metric("reshape", "reshape", "total variation between Q and the student's ratios among the other tokens", True),
    Metric("kl", "KL(Q || p)", "divergence of the target from the student, in nats", True),
    Metric("entropy", "entropy of Q", "in nats", True),
    Metric("negative_mass", "negative mass", "mass of Q below zero: Q is no distribution", True),
    Metric("p_y", "p(label)", "the student's probability of the label", False, 1.0),
    Metric("label_rank", "label rank", "1 + the number of more probable entries", False, log=True),
    Metric("nll", "NLL", "-log p(label), in nats", False),
    Metric("entropy_p", "entropy of p", "in nats", False),
    Metric("teacher_y", "teacher(label)", "the teacher's probability of the label", False, 1.0),
    Metric("teacher_rank", "label rank, teacher", "the rank of the label under the teacher", False, log=True),
    Metric("teacher_top_mass", "teacher's top k", "the teacher's mass on its k most probable entries", False, 1.0),
    Metric("disagreement", "teacher disagreement", "half the sum of |teacher - p| over the vocabulary", False, 1.0),
    Metric(NEGATIVE_MARGIN, "negative margin", MARGIN, False, None, True),
    Metric("p_y after", "p(label) after", "the later checkpoint's probability of the label", False, 1.0),
    Metric("label_rank after", "label rank after", "the rank of the label under the later checkpoint", False, log=True),
    Metric("gain", "gain of log p(label)", "log p(label) after minus before, in nats", False, signed=True),
    Metric("change", "change of p", "half the sum of |p after - p| over the vocabulary", False, 1.0),
)  # fmt: skip


def html(view: Any) -> str:
    """The page of a ``TokenView``; its policy forbids all requests and all other scripts."""
    style, script = ("".join((HERE / file).read_text(encoding="utf-8") for file in files) for files in (STYLE, SCRIPT))
    title = f"qlens view: {', '.join(view.methods)}"
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'; form-action 'none'"
    template = Template((HERE / TEMPLATE).read_text(encoding="utf-8"), autoescape=True)
    return template.render(policy=policy, title=title, style=style, data=_json(_data(view)), script=script)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(data: dict[str, Any]) -> str:
    """JSON in plain ASCII that cannot end a script element or open a comment."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _data(view: Any) -> dict[str, Any]:
    """All data of the page; numbers per token are packed into one block, described by ``layout``."""
    summary, after = view.summary, view.summary.after
    models = model_metrics(view)
    metrics = metrics_of(view, models)
    token_ids = np.array([token for text in view.texts for token in text.ids])
    slots = np.full(len(token_ids), -1)
    starts = np.cumsum([0, *(len(text.ids) for text in view.texts)])
    slots[[start + place for start, text in zip(starts, view.texts, strict=False) for place in text.places]] = range(
        len(summary)
    )
    totals = _totals(view)
    listed = [] if totals is None else totals.pop("ids")
    vocabulary, index = np.unique(
        np.concatenate([token_ids, summary.ids.ravel(), listed]).astype(int), return_inverse=True
    )
    strings = [view.token_text[token] for token in vocabulary.tolist()]
    running = [strings[at] for at in index[: len(token_ids)]]
    end = len(token_ids) + summary.ids.size
    arrays = {"tokens": index[: len(token_ids)], "slots": slots, "ids": index[len(token_ids) : end], "p": summary.probs}
    arrays |= {"labels": np.searchsorted(vocabulary, summary.models["label"]), "rest p": _rest(summary.probs)}
    if summary.teacher is not None:
        arrays |= {"teacher": summary.teacher, "rest teacher": _rest(summary.teacher)}
    if after is not None:
        arrays |= {"p after": after.probs, "rest p after": _rest(after.probs)}
    readings = [*_readings(summary), *([] if after is None else _readings(after))]
    for number, (move, frame) in enumerate(readings):
        arrays |= {f"move {number}": move, f"rest {number}": frame["total"].to_numpy() - 1 - move.sum(1)}
        arrays |= {f"{key} {number}": frame[key].to_numpy() for key in frame}
    segments = _segments(view)
    arrays |= {"segment": segments.codes} | {key: values.to_numpy() for key, values in models.items()}
    layout, blob = _packed(arrays)
    completes = {
        int(start) + at: text
        for start, end in zip(starts, starts[1:], strict=False)
        for at, text in completed(running[start:end]).items()
    }
    special = getattr(view.token_text, "special", frozenset())
    if totals is not None:
        totals |= {"pieces": index[end:].tolist()}
    return {
        "methods": [*view.methods, *([] if after is None else [f"{name}, after" for name in view.methods])],
        "bases": [int(number >= len(view.methods)) for number in range(len(readings))],
        "metrics": [m._asdict() | {"high": scale_end(m, summary, models)} for m in metrics],
        "texts": _texts(view, _user_columns(view), models),
        "pieces": strings,
        "special": np.flatnonzero(np.isin(vocabulary, list(special))).tolist(),
        "entries": vocabulary.tolist(),
        "completes": completes,
        "candidates": summary.ids.shape[1],
        "segments": list(segments.categories),
        "totals": totals,
        "notes": [_sizes(view), *view.notes],
        "layout": layout,
        "blob": blob,
    } | _ranked(view)


def metrics_of(view: Any, models: pd.DataFrame) -> list[Metric]:
    """The metrics that a view has values for; ``models`` as of ``model_metrics``."""
    return [m for m in METRICS if m.method or m.key in models] + _user_columns(view)


def _readings(summary: Summary) -> list[tuple[np.ndarray, pd.DataFrame]]:
    """Moves and metrics of every method."""
    return list(zip(summary.moves, summary.methods.values(), strict=True))


def _segments(view: Any) -> pd.Categorical:
    """The segment of every token."""
    names = [REST] * len(view.summary) if view.columns is None else list(view.columns["segment"])
    return pd.Categorical(names, categories=list(dict.fromkeys(names)))


def _user_columns(view: Any) -> list[Metric]:
    """Metrics of the data's own columns."""
    frame = pd.DataFrame() if view.columns is None else view.columns.drop(columns="segment")
    return [
        Metric(f"column {name}", name, f"{name} of the data", False, None, bool((frame[name] < 0).any()))
        for name in frame
    ]


def _texts(view: Any, columns: Sequence[Metric], models: pd.DataFrame) -> list[dict[str, Any]]:
    """Number, length, supervised tokens and the constant columns of every row."""
    texts, start = [], 0
    for text in view.texts:
        values = {metric.name: models[metric.key].iloc[start : start + len(text.places)] for metric in columns}
        constant = [f"{name} {each.iloc[0]:.4g}" for name, each in values.items() if each.nunique() == 1]
        texts.append({"row": text.row, "length": len(text.ids), "count": len(text.places), "columns": constant})
        start += len(text.places)
    return texts


def _totals(view: Any) -> dict[str, Any] | None:
    """The entries that each method promotes and demotes most, with their sums; ``ids`` in the vocabulary."""
    if view.totals is None:
        return None
    moves = np.stack(list(view.totals.moves.values()))
    order = np.argsort(-moves, 1, kind="stable")
    first = [[k for k in row[:ENTRIES] if move[k] > 0] for row, move in zip(order, moves, strict=True)]
    last = [[k for k in row[::-1][:ENTRIES] if move[k] < 0] for row, move in zip(order, moves, strict=True)]
    ids = np.unique(np.concatenate([*first, *last])).astype(int)
    places = {k: number for number, k in enumerate(ids.tolist())}

    def rounded(values: np.ndarray) -> list:
        return [float(f"{x:.5g}") for x in values[ids]]

    return {
        "ids": ids,
        "tokens": view.totals.tokens,
        "labels": view.totals.labels[ids].astype(int).tolist(),
        "p": rounded(view.totals.p),
        "moves": [rounded(move) for move in moves],
        "label_moves": [rounded(move) for move in view.totals.label_moves.values()],
        "promoted": [[places[k] for k in row] for row in first],
        "demoted": [[places[k] for k in row] for row in last],
    }


def _sizes(view: Any) -> str:
    """The numbers of tokens, rows and entries, in words."""
    tokens, (_, entries) = len(view.summary), view.summary.ids.shape
    return f"{tokens} supervised tokens in {len(view.texts)} rows, {entries} vocabulary entries stored for each"


def _rest(probs: np.ndarray) -> np.ndarray:
    """The probability of all entries that are not stored."""
    return np.maximum(0.0, 1 - probs.sum(1, dtype=np.float64))


def model_metrics(view: Any) -> pd.DataFrame:
    """Metrics of the models and of the data, by the keys of ``METRICS``."""
    models, after = view.summary.models, view.summary.after
    frame = models.drop(columns=["label", "runner_up"]).rename(columns={"entropy": "entropy_p"}).assign(supervised=1.0)
    if after is not None:
        later = after.models
        frame = frame.assign(**{f"{key} after": later[key] for key in ("p_y", "label_rank")})
        frame = frame.assign(gain=models["nll"] - later["nll"], change=later["change"])
    user = {} if view.columns is None else view.columns.drop(columns="segment")
    return frame.assign(**{f"column {name}": user[name] for name in user})


def scale_end(metric: Metric, summary: Summary, models: pd.DataFrame) -> float:
    """The upper end of a colour scale: a round number above most values; equal for all methods."""
    if metric.high is not None:
        return metric.high
    frames = summary.methods.values() if metric.method else [models]
    values = np.abs(np.concatenate([frame[metric.key].to_numpy() for frame in frames]))
    values = values[np.isfinite(values) & (values > 1e-6)]
    if not len(values):
        return 1.0
    top = float(np.quantile(values, TYPICAL))
    step = 10.0 ** np.floor(np.log10(top))
    high = float(np.ceil(top / step - 1e-9) * step)
    return max(high, 10.0) if metric.log else high


def _ranked(view: Any) -> dict[str, Any]:
    """The ranks of the rows shown, and the first tokens of every order among them."""
    ranking, row_numbers = view.rank(), {text.row: number for number, text in enumerate(view.texts)}
    places = [(text.row, place + 1) for text in view.texts for place in text.places]
    slot = {place: number for number, place in enumerate(places)}
    orders, scores, first_tokens = [], {}, ranking.first_tokens(10 * LISTED)
    for by in ranking.orders:
        rows = ranking.rows[(ranking.rows["by"] == by) & ranking.rows["row"].isin(row_numbers)]
        tokens = first_tokens[first_tokens["by"] == by]
        listed = [place for place in zip(tokens["row"], tokens["position"], strict=True) if place in slot]
        ranks = {row_numbers[row]: rank for row, rank in zip(rows["row"], rows["rank"], strict=True)}
        first = [slot[place] for place in listed[:LISTED]]
        order = [None if np.isnan(ranks[at]) else int(ranks[at]) for at in range(len(row_numbers))]
        orders.append({"by": by, "alike": ranking.alike(by), "ranks": order, "tokens": first})
        score = dict(zip(rows["row"].map(row_numbers), rows["score"], strict=True))
        scores[by] = [None if np.isnan(score[at]) else round(float(score[at]), 4) for at in range(len(row_numbers))]
    return {"orders": orders, "scores": scores, "ranked": int(ranking.rows["row"].nunique())}


def _packed(arrays: dict[str, Sequence]) -> tuple[dict[str, list], str]:
    """Where each array lies, and all of them as int32 or rounded float32, deflated, in base64."""
    layout, parts, start = {}, [], 0
    for name, values in arrays.items():
        whole = np.issubdtype(np.asarray(values).dtype, np.integer)
        flat = np.asarray(values, np.int32 if whole else np.float32).ravel()
        layout[name] = [start, len(flat), "int" if whole else "float"]
        start += len(flat)
        parts.append(flat.view(np.uint32) if whole else _rounded(flat))
    joined = np.concatenate(parts).astype("<u4")
    return layout, base64.b64encode(zlib.compress(joined.tobytes(), 9)).decode()


def _rounded(values: np.ndarray) -> np.ndarray:
    """Bits of float32, rounded to a relative 1e-4, which compresses to two thirds."""
    bits, half = values.view(np.uint32), np.uint32(1 << (int(DROPPED) - 1))
    return np.where(np.isfinite(values), (bits + half) >> DROPPED << DROPPED, bits)
