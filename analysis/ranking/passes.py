"""Passes of models over rows of data: scores of all supervised tokens, a few rows in memory at a time."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from qlens.analysis.compare.run_folder import locked
from qlens.analysis.ranking.ranking import Ranking
from qlens.analysis.ranking.row_texts import RowTexts
from qlens.analysis.ranking.scores import Scores, token_columns
from qlens.analysis.ranking.shards import Arrays, Shards, configuration, default_folder
from qlens.analysis.token_view import inputs
from qlens.analysis.token_view.token_text import TokenText
from qlens.core.errors import InputError, brief
from qlens.core.files import shown_path, user_path
from qlens.core.progress import bar, duration, stderr
from qlens.data.compatibility import shortest_context
from qlens.data.from_text import ENTRIES, check_fits, token_batches
from qlens.data.rows import load_rows
from qlens.engine.models.backbones import Backbones
from qlens.registry import Variant
from qlens.registry.variant import ALONE

SHARD = 32  # rows per file
TOKENS = 2**13  # padded tokens per forward pass on an accelerator; on a CPU one row at a time is quicker

Examples = Mapping[int, Mapping[str, Any]]


def rank(
    model: nn.Module | str | Path,
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
    rows: Sequence[Any] | str | Path,
    variants: Sequence[Variant | str | Callable] | None = None,
    *,
    teacher: nn.Module | str | Path | None = None,
    reference: nn.Module | str | Path | None = None,
    max_rows: int | None = None,
    store: str | Path | None = None,
    progress: bool = True,
) -> Ranking:
    """Rank rows of data and their tokens by how little each method weights their labels, and by the models' margin.

    Every row goes through the models once. A few numbers per token are kept, never logits: 10,000 rows of 130 supervised
    tokens take 80 MB with two methods. Finished rows are written to a folder, and the same call continues there after an
    interruption, with the same result to the last bit (on the same machine and number of threads); a finished ranking is
    read from it. For methods of scope "sequence" or "batch", a row is the batch.

    Args:
        model: a causal language model, or its folder.
        tokenizer: of the model, or its folder; None with a folder as ``model``.
        rows: a path or a ``datasets.Dataset`` (``qlens.data.load_rows``), or a list of texts, (prompt, completion) pairs,
            rows of data, or ``{"input_ids", "labels"}``.
        variants: Variants, specs or loss functions; by default sft and dft, and with a teacher target_sft and kd.
        teacher, reference: other models over the same vocabulary, or their folders, for methods that need one.
        max_rows: stop after this many rows that can be ranked; by default all.
        store: the folder of finished rows; by default one in qlens' cache (``$QLENS_CACHE``) that is named by data, models,
            methods and versions, so that other inputs begin anew.
        progress: whether progress is shown on standard error.

    Returns:
        a ranking: ``print`` it, ``export`` the data by it, or read ``rows`` and ``tokens``.

    Raises:
        InputError: as ``qlens.view``; or ``store`` holds the rows of other inputs, of which the first is named.

    Source: Xie et al. 2026 (arXiv 2606.11189): Q = p - g.

    Example:
        >>> ranking = qlens.rank("path/to/model", None, "data.jsonl", ["dft"])  # doctest: +SKIP
        >>> print(ranking.export("weighted.jsonl"))  # doctest: +SKIP
    """
    data = load_rows(rows)
    if not len(data):
        raise InputError(f"rows must be a data file or a non-empty list of texts, pairs or rows, got {brief(rows)}")
    chosen = inputs.variants_of(variants, teacher, reference, (*inputs.FIELDS, *inputs.columns_of(data)))
    inputs.check_number("max_rows", 1 if max_rows is None else max_rows)
    student, tokenizer, others = inputs.loaded_models(model, tokenizer, teacher=teacher, reference=reference)
    limit = shortest_context(student, *others.values())
    examples, skipped = inputs.encoded_rows(data, tokenizer, limit, max_rows, progress)
    check_fits(list(examples.values()), {"model": student, **others})
    whole = any(variant.scope not in ALONE for variant in chosen)
    tokens = 0 if whole or student.device.type == "cpu" else TOKENS
    config = configuration({"model": student, **others}, list(examples.values()), chosen, tokens)
    folder = default_folder(config) if store is None else user_path(store, "store")
    with locked(folder, config, "$QLENS_CACHE" if store is None else "store"):
        shards = list(_shards(Passes(student, others, chosen, whole, tokens), examples, Shards(folder), progress))
    columns = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    notes = [*inputs.left_out(skipped), _rate(columns, examples, student.device.type == "cpu")]
    ids = {row: np.asarray(example["input_ids"], np.int32) for row, example in examples.items()}
    texts = RowTexts(
        TokenText(tokenizer), ids, {row: inputs.places_of(example)[0] for row, example in examples.items()}
    )
    read = data[: max([*examples, *skipped])]
    if len(read) < len(data):
        notes.append(f"rows from {len(read) + 1} on were not read (max_rows={max_rows}); an export ends there")
    scores = Scores.of(columns, [variant.spec for variant in chosen])
    return Ranking.of(scores, texts, notes, data=read, skipped=skipped)


class Passes:
    """Scores of encoded rows.

    Args:
        model: the student.
        others: teacher and reference, by name.
        variants: the methods.
        whole: whether all tokens of a row are read together.
        tokens: padded tokens per forward pass; a row more than fits goes alone.
    """

    def __init__(
        self, model: nn.Module, others: Mapping[str, nn.Module], variants: Sequence[Variant], whole: bool, tokens: int
    ):
        self.model, self.others, self.variants, self.whole, self.tokens = model, others, variants, whole, tokens
        self.needs = sorted({need for variant in variants for need in variant.needs})
        self.backbones = Backbones(None)

    def batches(self, examples: Examples) -> Iterator[list[int]]:
        """The numbers of the rows of each pass."""
        if not self.tokens:
            yield from ([row] for row in examples)
            return
        batch: list[int] = []
        for row in sorted(examples, key=lambda row: len(examples[row]["input_ids"])):
            if batch and (len(batch) + 1) * len(examples[row]["input_ids"]) > self.tokens:
                yield batch
                batch = []
            batch.append(row)
        yield batch

    def run(self, examples: Examples, advance: Callable[[int], None]) -> Arrays:
        """The columns of ``Scores``, row by row; with ``seconds``: of everything, and of the models alone."""
        start, in_models, parts, order = time.perf_counter(), 0.0, [], []
        for batch in self.batches(examples):
            entries = None if self.whole else ENTRIES
            chunks = token_batches(
                self.model,
                [examples[row] for row in batch],
                len(batch),
                self.needs,
                entries,
                self.backbones,
                **self.others,
            )
            while True:
                before = time.perf_counter()
                tokens = next(chunks, None)
                in_models += time.perf_counter() - before
                if tokens is None:
                    break
                parts.append(token_columns(tokens, self.variants))
            order += batch
            advance(len(batch))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        places = [(row, place + 1) for row in order for place in inputs.places_of(examples[row])]
        columns["row"], columns["position"] = np.array(places, np.int32).T
        columns = {name: values[np.argsort(columns["row"], kind="stable")] for name, values in columns.items()}
        return columns | {"seconds": np.array([[time.perf_counter() - start, in_models]])}


def _shards(passes: Passes, examples: Examples, shards: Shards, progress: bool) -> Iterator[Arrays]:
    """The columns of all rows, a shard at a time; those that are stored are read."""
    numbers, console = list(examples), stderr(progress)
    parts = [numbers[at : at + SHARD] for at in range(0, len(numbers), SHARD)]
    stored = [shards.read(number) for number in range(len(parts))]
    done = sum(len(rows) for rows, arrays in zip(parts, stored, strict=True) if arrays is not None)
    state = f"{done} of {len(numbers)} rows are there" if done else "no row is there yet"
    console.print(f"Scores of finished rows are kept in {shown_path(shards.folder)}: {state}")
    try:
        with bar(len(numbers), "Rank", "rows", done, progress and done < len(numbers)) as advance:
            for number, (rows, arrays) in enumerate(zip(parts, stored, strict=True)):
                if arrays is None:
                    arrays = passes.run({row: examples[row] for row in rows}, advance)
                    shards.write(number, arrays)
                    done += len(rows)
                yield arrays
    except KeyboardInterrupt:
        console.print(f"Interrupted: {done} of {len(numbers)} rows are kept; the same command or call continues there")
        raise


def _rate(columns: Arrays, examples: Examples, on_cpu: bool) -> str:
    """The rate at which the rows were read, over all sessions, in words."""
    total, in_models = columns.pop("seconds").sum(0)
    read = sum(len(example["input_ids"]) for example in examples.values())
    share = f", {in_models / total:.0%} of it in the models" if on_cpu else ""  # elsewhere they run meanwhile
    return (
        f"{len(examples)} rows with {read} tokens, {len(columns['row'])} of them supervised, were read in {duration(total)}: "
        f"{len(examples) / total:.2f} rows and {read / total:.0f} tokens per second{share}"
    )
