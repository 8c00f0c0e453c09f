"""The page of a token view: its data packed small, its style and script inlined, and a policy that lets nothing else in."""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from qlens.analysis.token_view.ranking import SUSPICION
from qlens.analysis.token_view.token_text import completed

HERE = Path(__file__).parent
TEMPLATE, STYLE, SCRIPT = "view.html", ("view.css",), ("view_text.js", "view.js")
LISTED = 30  # tokens in the list of the least trusted
DIGITS = np.uint32(11)  # bits of the mantissa left out: numbers keep four digits, and pack to half the size
TYPICAL = 0.98  # the part of the values that lies within the scale of a metric without natural end


class Metric(NamedTuple):
    """What the text may be coloured by: its key in a summary's frames, and what a reader is told."""

    key: str
    name: str
    says: str
    method: bool  # of a method's target, or of the models alone
    high: float | None = None  # the natural end of the scale, from 0
    signed: bool = False


METRICS = (
    Metric("trust", "trust", "pull toward the label as a share of SFT's, -g_y / (1 - p_y)", True, 1.0, True),
    Metric("ignored", "ignored", "1 - Q_y: the part of the target that is not on the label", True, 1.0, True),
    Metric("reshape", "reshape", "how far Q leaves the student's own ratios among the other tokens", True),
    Metric("kl", "KL(Q || p)", "in nats: how far the target is from the student", True),
    Metric("entropy", "entropy of Q", "in nats", True),
    Metric("negative_mass", "negative mass", "what Q has below zero: pushed down harder than any distribution could", True),
    Metric("p_y", "p(label)", "the student's probability of the label", False, 1.0),
    Metric("nll", "NLL", "-log p(label), in nats", False),
    Metric("entropy_p", "entropy of p", "in nats", False),
    Metric("teacher_y", "teacher(label)", "the teacher's probability of the label", False, 1.0),
    Metric("disagreement", "teacher disagreement", "half the sum of |teacher - p| over the vocabulary", False, 1.0),
    Metric(SUSPICION, SUSPICION, "nats by which another token beats the label, for student and teacher alike", False, None, True),
)  # fmt: skip


def html(view: Any) -> str:
    """The page of a ``TokenView``: data, style and script in one file; its policy forbids every request and other script."""
    style, script = ("".join((HERE / file).read_text(encoding="utf-8") for file in files) for files in (STYLE, SCRIPT))
    title = f"qlens view: {', '.join(view.methods)}"
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'; form-action 'none'"
    filled = {"policy": policy, "title": escape(title), "style": style, "data": _inert(_data(view)), "script": script}
    template = (HERE / TEMPLATE).read_text(encoding="utf-8")
    return re.sub(
        r"\{\{(\w+)\}\}", lambda mark: filled[mark[1]], template
    )  # in one go: what is filled in is not searched


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(data: dict[str, Any]) -> str:
    """JSON in plain ASCII that neither ends a script element nor opens a comment, whatever the tokens are."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _data(view: Any) -> dict[str, Any]:
    """Everything the page shows; numbers per token as one packed block, ``layout`` says what lies where."""
    summary = view.summary
    metrics = [m for m in METRICS if m.method or m.key in _models(summary)]
    shown = np.array([token for text in view.texts for token in text.ids])
    slots = np.full(len(shown), -1)
    starts = np.cumsum([0, *(len(text.ids) for text in view.texts)])
    slots[[start + place for start, text in zip(starts, view.texts, strict=False) for place in text.places]] = range(
        len(summary)
    )
    vocabulary, index = np.unique(np.concatenate([shown, summary.ids.ravel()]), return_inverse=True)
    strings = [view.pieces[token] for token in vocabulary.tolist()]
    running = [strings[at] for at in index[: len(shown)]]
    arrays = {"tokens": index[: len(shown)], "slots": slots, "ids": index[len(shown) :], "p": summary.probs}
    arrays |= {"labels": np.searchsorted(vocabulary, summary.models["label"])}
    arrays |= {"rest p": _rest(summary.probs)}
    for number, (move, frame) in enumerate(zip(summary.moves, summary.methods.values(), strict=True)):
        arrays |= {f"move {number}": move, f"rest {number}": frame["total"].to_numpy() - 1 - move.sum(1)}
    if summary.teacher is not None:
        arrays |= {"teacher": summary.teacher, "rest teacher": _rest(summary.teacher)}
    arrays |= {key: values.to_numpy() for key, values in _models(summary).items()}
    for number, frame in enumerate(summary.methods.values()):
        arrays |= {f"{key} {number}": frame[key].to_numpy() for key in frame}
    layout, blob = _packed(arrays)
    completes = {
        int(start) + at: text
        for start, end in zip(starts, starts[1:], strict=False)
        for at, text in completed(running[start:end]).items()
    }
    return {
        "methods": list(view.methods),
        "metrics": [metric._asdict() | {"high": metric.high or _high(metric, summary)} for metric in metrics],
        "texts": [{"row": text.row, "length": len(text.ids), "count": len(text.places)} for text in view.texts],
        "pieces": strings,
        "completes": completes,
        "candidates": summary.ids.shape[1],
        "notes": [_told(view), *view.notes],
        "layout": layout,
        "blob": blob,
    } | _ranked(view)


def _told(view: Any) -> str:
    tokens, (_, kept) = len(view.summary), view.summary.ids.shape
    return f"{tokens} supervised tokens in {len(view.texts)} rows, {kept} candidates of the vocabulary kept for each"


def _rest(probs: np.ndarray) -> np.ndarray:
    """What the candidates leave to all other tokens."""
    return np.maximum(0.0, 1 - probs.sum(1, dtype=np.float64))


def _models(summary: Any) -> pd.DataFrame:
    """What the models say of every token, under the names of ``METRICS``."""
    return summary.models.drop(columns=["label", "rival"]).rename(columns={"entropy": "entropy_p"})


def _high(metric: Metric, summary: Any) -> float:
    """The upper end of a scale: a round number below which most values lie; equal for all methods."""
    frames = summary.methods.values() if metric.method else [_models(summary)]
    values = np.abs(np.concatenate([frame[metric.key].to_numpy() for frame in frames]))
    values = values[np.isfinite(values) & (values > 1e-6)]
    if not len(values):
        return 1.0
    top = float(np.quantile(values, TYPICAL))
    step = 10.0 ** np.floor(np.log10(top))
    return float(np.ceil(top / step - 1e-9) * step)


def _ranked(view: Any) -> dict[str, Any]:
    """The ranking of the rows shown, and the first tokens of every order that are among them."""
    ranking, shown = view.rank(), {text.row: number for number, text in enumerate(view.texts)}
    places = [(text.row, place + 1) for text in view.texts for place in text.places]
    slot = {place: number for number, place in enumerate(places)}
    orders, figures = [], {}
    for by in ranking.orders:
        rows = ranking.rows[(ranking.rows["by"] == by) & ranking.rows["row"].isin(shown)]
        tokens = ranking.tokens[ranking.tokens["by"] == by].head(10 * LISTED)
        there = [place for place in zip(tokens["row"], tokens["position"], strict=True) if place in slot]
        ranks = {shown[row]: rank for row, rank in zip(rows["row"], rows["rank"], strict=True)}
        listed = [slot[place] for place in there[:LISTED]]
        order = [None if np.isnan(ranks[at]) else int(ranks[at]) for at in range(len(shown))]
        orders.append({"by": by, "alike": ranking.alike(by), "ranks": order, "tokens": listed})
        score = dict(zip(rows["row"].map(shown), rows["score"], strict=True))
        figures[by] = [None if np.isnan(score[at]) else round(float(score[at]), 4) for at in range(len(shown))]
    return {"orders": orders, "scores": figures, "ranked": int(ranking.rows["row"].nunique())}


def _packed(arrays: dict[str, Sequence]) -> tuple[dict[str, list], str]:
    """Four bytes per number, floats rounded, bytes of equal weight side by side, deflated; and where each array lies."""
    layout, parts, start = {}, [], 0
    for name, values in arrays.items():
        whole = np.issubdtype(np.asarray(values).dtype, np.integer)
        flat = np.asarray(values, np.int32 if whole else np.float32).ravel()
        layout[name] = [start, len(flat), "int" if whole else "float"]
        start += len(flat)
        parts.append(flat.view(np.uint32) if whole else _rounded(flat))
    joined = np.concatenate(parts).astype("<u4")
    planes = np.ascontiguousarray(joined.view(np.uint8).reshape(-1, 4).T)
    return layout, base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def _rounded(values: np.ndarray) -> np.ndarray:
    """Float32 as bits, rounded to a relative 1e-4."""
    bits, half = values.view(np.uint32), np.uint32(1 << (int(DIGITS) - 1))
    return np.where(np.isfinite(values), (bits + half) >> DIGITS << DIGITS, bits)
