"""Columns of the data through TRL's preparation, packing and padding."""

import logging

import pytest
import torch
from cases import case
from datasets import Dataset
from tiny_models import llama, parameters, steps_of
from torch.testing import assert_close

from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE, Supervised

WEIGHTS = [0.5, 2.0, 1.0, 0.0, 3.0, 0.25]


def weighted(words):
    return [{**row, "weight": weight} for row, weight in zip(words, WEIGHTS, strict=True)]


def encoded(count=5):
    """Rows of token ids with a value per token in every column."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for number in range(count):
        size = 5 + 3 * number
        ids = torch.randint(3, 30, (size,), generator=draw).tolist()
        weight = torch.rand(size, generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE, IGNORE, *ids[2:]], "weight": weight})
    return rows


def seen(trainer):
    """(token, weight) of every supervised label of one epoch, in order of size."""
    pairs = []
    for batch in trainer.get_train_dataloader():
        where = Supervised.of(batch)
        pairs += zip(where.labels.tolist(), where.at_labels(batch["weight"]).tolist(), strict=True)
    return sorted(pairs)


def test_values_per_row_stay_with_their_rows(train, words):
    expected = None
    for options in (
        {}, dict(packing=True, max_length=48), dict(packing=True, packing_strategy="bfd_split", max_length=64),
        dict(padding_free=True, max_length=None), dict(shuffle_dataset=True, pad_to_multiple_of=8), dict(batch=6),
    ):  # fmt: skip
        with case(str(options)):
            values = seen(train("qlens", weighted(words), steps=0, variant="sft", **options))
            expected = expected or values
            assert values == expected
    assert {weight for _, weight in expected} == set(WEIGHTS)


def test_values_per_token_are_cut_and_packed_with_the_tokens(train):
    rows = encoded()
    for options in (
        dict(max_length=9), dict(max_length=14, packing=True), dict(max_length=4, packing=True, packing_strategy="wrapped")
    ):  # fmt: skip
        with case(str(options)):
            trainer = train("qlens", rows, steps=0, variant="sft", batch=1, **options)
            held = {(t, round(w, 6)) for row in rows for t, w in zip(row["input_ids"], row["weight"], strict=True)}
            values = seen(trainer)
            assert values and {(token, round(weight, 6)) for token, weight in values} <= held
    kept = sum(max(0, min(len(row["input_ids"]), 9) - 2) for row in rows)
    assert len(seen(train("qlens", rows, steps=0, variant="sft", max_length=9))) == kept


def test_a_packed_run_with_weights_equals_the_run_of_its_rows(train, words):
    alone = train("qlens", weighted(words), steps=1, batch=6, variant="dft")
    packed = train("qlens", weighted(words), steps=1, batch=6, variant="dft", packing=True, max_length=64)
    assert len(packed.train_dataset) < len(alone.train_dataset)
    assert steps_of(packed)[0]["loss"] == pytest.approx(steps_of(alone)[0]["loss"], rel=1e-4)
    assert_close(parameters(packed.model), parameters(alone.model), rtol=1e-4, atol=1e-6)
    plain = train("qlens", words, steps=1, batch=6, variant="dft")
    assert float((parameters(plain.model) - parameters(alone.model)).norm()) > 1e-3


def test_critical_and_advantage_reach_their_methods(train, words):
    rows = [{**row, "critical": n % 2 == 0, "advantage": n - 2.0} for n, row in enumerate(words)]
    for spec in ("cft", "reinforce"):
        ends = [train("qlens", rows, variant=spec, fused=fused).model for fused in (None, False)]
        assert_close(parameters(ends[0]), parameters(ends[1]), rtol=1e-4, atol=1e-6)
        assert float((parameters(ends[0]) - parameters(llama(context=256))).norm()) > 1e-3


def test_columns_that_do_not_fit_are_refused_with_their_row(train, words):
    rows = [{**row, "weight": [1.0, 2.0]} for row in words]
    with pytest.raises(InputError, match="train dataset, row 1: weight has 2 values for .* tokens: give one value"):
        train("qlens", rows, steps=0, variant="sft")
    with pytest.raises(InputError, match="row 2: weight is missing"):
        train("qlens", [{**row, "weight": None if n == 1 else 1.0} for n, row in enumerate(words)], variant="sft")
    pairs = [{**row, "chosen": n % 2 == 0, "pair": n // 2} for n, row in enumerate(words)]
    with pytest.raises(InputError, match="may part the two texts of a pair"):
        train("qlens", pairs, steps=0, variant="dpo", reference=llama(1), packing=True, max_length=64)


def test_what_is_cut_and_left_out_is_logged(train, words, caplog):
    with caplog.at_level(logging.WARNING, "qlens"):
        trainer = train("qlens", words, steps=0, variant="sft", max_length=8)
    assert len(trainer.train_dataset) == 2
    assert any(
        "5 of 6 rows of the train dataset are longer than max_length=8 and cut; 4 have no supervised token and are left out"
        in text
        for text in caplog.messages
    ), caplog.messages


def test_lists_of_rows_and_streams_are_taken(train, words):
    from tiny_models import rows

    examples = [row for row in rows(6) if any(label != IGNORE for label in row["labels"])]
    ends = [
        parameters(train("qlens", data, steps=1, variant="dft").model)
        for data in (examples, Dataset.from_list(examples), Dataset.from_list(examples).to_iterable_dataset())
    ]
    assert float((ends[0] - parameters(llama(context=256))).norm()) > 1e-3
    assert_close(ends[1], ends[0]), assert_close(ends[2].norm(), ends[0].norm(), rtol=0.2, atol=0)
