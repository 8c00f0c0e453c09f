"""Real text: seconds and memory of explain, distances, token view and Watch on a user's own model and data."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

import qlens
from qlens.analysis.benchmarks.lens import unregistered
from qlens.analysis.token_view.token_view import view
from qlens.cli.inputs import Source, own_models, own_tokens
from qlens.core.progress import track
from qlens.data.collator import collate
from qlens.lens.equivalences import distances

ROWS = 8  # rows of the data
MEMORY = 1.3  # limit of the peak above the loaded models, in GiB
VIEW = 1.3  # limit of the view's time as a multiple of its two forward passes
RECORD = 1.0  # limit of the time of a record of Watch as a multiple of a training step
STATUS = Path("/proc/self/status")


CASES: dict[str, tuple[str | Callable, float | None]] = {
    "explain dft": ("dft", 20.0),
    "explain eaft@axolotl": ("eaft@axolotl", 20.0),
    "explain an unregistered loss": (unregistered, 20.0),
    "explain target_sft, with a teacher": ("target_sft", 40.0),
    "list --distances": ("", 60.0),
    "view of sft and dft": ("", None),
    "a record of Watch, 3 methods": ("", None),
}
"""The cases by name: the loss that is explained, and the limit in seconds beyond loading and the model's own forward pass.

The view is measured against two forward passes over its rows, a record of Watch against a training step on them.
"""


def real_text(model: str, data: str) -> list[dict[str, Any]]:
    """Seconds and peak memory of every case, each in its own process.

    Args:
        model: a Hugging Face folder, which is the teacher too.
        data: JSON Lines.

    Returns:
        a row per case as ``lens`` returns them: its seconds, and its peak above the loaded models in GiB.
    """
    rows = []
    for name in track(CASES, len(CASES), "reading the text"):
        code = f"from qlens.analysis.benchmarks.real_text import measure; measure({name!r}, {model!r}, {data!r})"
        run = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
    return rows


def measure(name: str, model: str, data: str) -> None:
    """Run one case and print its row as JSON."""
    loss, limit = CASES[name]
    teacher = model if "teacher" in name else None
    with redirect_stdout(sys.stderr):
        if limit is None:
            row = (_view if name.startswith("view") else _watch)(model, data)
        else:
            needs = ("teacher",) if teacher else ("old", "second", "negatives") if not loss else ()
            own = own_tokens(model, teacher, None, Source(data), ROWS, None, "float32", needs)
            with Peak() as peak:
                began = time.perf_counter()
                str(qlens.explain(loss, **own)) if loss else str(distances(own["tokens"]))
                row = {"seconds": time.perf_counter() - began, "tokens": len(own["tokens"]), "limit": limit}
            logits = own["tokens"].logits.numel() * 4 / 2**30  # they stand above the model too
            row["GiB"] = peak.above + logits * (2 if teacher else 1)
    print(json.dumps({"case": f"{name}, {row['tokens']} tokens", "GiB limit": MEMORY} | row))


def _view(model: str, data: str) -> dict[str, Any]:
    """Seconds of the view of some rows, against two forward passes over them."""
    loaded, rows = own_models(model, None, None, Source(data), "cpu", "float32")
    examples = qlens.encode(rows[:ROWS], loaded["tokenizer"]).examples
    passes = [torch.tensor([example["input_ids"]]) for example in examples]
    with torch.inference_mode():
        loaded["model"](passes[0])  # warm-up
        began = time.perf_counter()
        for ids in (*passes, *passes):
            loaded["model"](ids)
    forward = time.perf_counter() - began
    with Peak() as peak:
        began = time.perf_counter()
        page = view(loaded["model"], loaded["tokenizer"], rows[:ROWS], ["sft", "dft"])
        seconds = time.perf_counter() - began
    return _against(seconds, forward, VIEW, len(page.table), peak.above)


def _watch(model: str, data: str) -> dict[str, Any]:
    """Seconds of a record on some rows, against a training step on them."""
    loaded, rows = own_models(model, None, None, Source(data), "cpu", "float32")
    student, examples = loaded["model"], qlens.encode(rows[:ROWS], loaded["tokenizer"]).examples
    watch = qlens.Watch(["sft", "dft", "eaft"], examples, tokens=64)
    watch.record(student, 0)  # the first also verifies the head
    with Peak() as peak:
        began = time.perf_counter()
        watch.record(student, 1)
        seconds = time.perf_counter() - began
    began = time.perf_counter()
    student.train()(**collate(examples)).loss.backward()
    return _against(seconds, time.perf_counter() - began, RECORD, 64, peak.above)


def _against(seconds: float, other: float, limit: float, tokens: int, peak: float) -> dict[str, Any]:
    return {"seconds": seconds, "limit": limit * other, "ratio": seconds / other, "tokens": tokens, "GiB": peak}


class Peak:
    """The most memory that the program itself allocates in a context, sampled 200 times a second.

    Anonymous memory alone: pages of libraries and weight files come and go with the memory of other programs.

    Attributes:
        above: GiB above the memory at the beginning.
    """

    def __enter__(self) -> "Peak":
        self.before, self.above, self.over = _anonymous(), 0.0, threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _sample(self) -> None:
        while True:
            self.above = max(self.above, _anonymous() - self.before)
            if self.over.wait(0.005):
                return


def _anonymous() -> float:
    """Anonymous memory of this process, in GiB."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) / 2**20
