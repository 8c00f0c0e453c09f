"""Shift, mask and padding, against loops written out."""

import pytest
import torch
import torch.nn.functional as F
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st

from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE, Supervised, positions
from qlens.data.collator import collate

LABEL = st.one_of(st.just(IGNORE), st.integers(0, 9))
ROWS = st.lists(st.lists(LABEL, min_size=1, max_size=6), min_size=1, max_size=5)


def by_hand(rows: list[list[int]]) -> list[tuple[int, int, int]]:
    """(row, predicting position, label) of every supervised token."""
    return [(r, t - 1, row[t]) for r, row in enumerate(rows) for t in range(1, len(row)) if row[t] != IGNORE]


def padded(rows: list[list[int]], side: str, extra: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Labels, attention mask and every row's offset."""
    width = max(map(len, rows)) + extra
    gaps = [width - len(row) for row in rows]
    offsets = [gap if side == "left" else 0 for gap in gaps]
    labels = [[IGNORE] * a + row + [IGNORE] * (g - a) for a, g, row in zip(offsets, gaps, rows, strict=True)]
    mask = [[0] * a + [1] * len(row) + [0] * (g - a) for a, g, row in zip(offsets, gaps, rows, strict=True)]
    return torch.tensor(labels), torch.tensor(mask), offsets


def test_shift_and_mask_on_three_tokens():
    supervised = Supervised(torch.tensor([[IGNORE, IGNORE, 7]]))
    values = torch.tensor([[[0.0], [1.0], [2.0]]])
    assert supervised.labels.tolist() == [7]
    assert supervised.take(values).tolist() == [[1.0]]  # token 2 is predicted from position 1


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, side=st.sampled_from(["left", "right"]), extra=st.integers(0, 3))
def test_padding_changes_nothing(rows, side, extra):
    labels, mask, offsets = padded(rows, side, extra)
    supervised = Supervised(labels, mask)
    expected = by_hand(rows)
    where = torch.stack(torch.meshgrid(*map(torch.arange, labels.shape), indexing="ij"), -1)
    positions = [(r, t - offsets[r]) for r, t in supervised.take(where).tolist()]
    assert positions == [(r, t) for r, t, _ in expected]
    assert supervised.labels.tolist() == [label for _, _, label in expected]
    order = list(dict.fromkeys(r for r, _, _ in expected))
    assert supervised.sequence.tolist() == [order.index(r) for r, _, _ in expected]
    assert len(supervised) == len(expected)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_packing_changes_nothing(rows):
    packed = torch.tensor([[label for row in rows for label in row]])
    restarts = torch.tensor([[t for row in rows for t in range(len(row))]])
    supervised = Supervised(packed, position_ids=restarts)
    alone = Supervised(*padded(rows, "right", 0)[:2])
    assert supervised.labels.tolist() == alone.labels.tolist()
    assert supervised.sequence.tolist() == alone.sequence.tolist()
    assert restarts.flatten()[supervised.index].tolist() == [t for _, t, _ in by_hand(rows)]


def test_nothing_predicts_the_first_token_of_a_left_padded_row():
    labels, mask = torch.tensor([[IGNORE, IGNORE, 4, 5]]), torch.tensor([[0, 0, 1, 1]])
    assert Supervised(labels, mask).labels.tolist() == [5]


def test_take_propagates_gradients_to_its_rows():
    labels = torch.tensor([[1, 2, IGNORE], [3, IGNORE, 4]])
    values = torch.randn(2, 3, 5, requires_grad=True)
    supervised = Supervised(labels)
    weight = torch.tensor([1.0, 10.0])
    (supervised.take(values) * weight[:, None]).sum().backward()
    expected = torch.zeros(2, 3, 5)
    expected[0, 0], expected[1, 1] = 1.0, 10.0
    torch.testing.assert_close(values.grad, expected)


def test_cross_entropy_over_taken_rows_is_the_plain_loop():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    labels[torch.rand(3, 6) < 0.4] = IGNORE
    learned = [(b, t) for b in range(3) for t in range(1, 6) if labels[b, t] != IGNORE]
    terms = [F.cross_entropy(logits[b, t - 1], labels[b, t]) for b, t in learned]
    supervised = Supervised(labels)
    loss = F.cross_entropy(supervised.take(logits), supervised.labels)
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_an_empty_selection_has_a_graph():
    values = torch.randn(2, 3, 4, requires_grad=True)
    rows = Supervised(torch.full((2, 3), IGNORE)).take(values)
    rows.sum().backward()
    assert rows.shape == (0, 4)
    assert values.grad is not None and not values.grad.any()


def test_collate_pads_right():
    batch = collate([{"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}, {"input_ids": [8], "labels": [8]}], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [8, IGNORE, IGNORE]]


def test_collate_keeps_given_masks_and_takes_tensors():
    example = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2]), "attention_mask": [0, 1]}
    assert collate([example])["attention_mask"].tolist() == [[0, 1]]


def test_collate_refuses_labels_that_do_not_fit():
    for given_labels in [{}, {"labels": [1]}]:
        with case(given_labels):
            example = {"input_ids": [1, 2], **given_labels}
            with pytest.raises(InputError, match="example 0 .* input_ids and labels of one length"):
                collate([example])


def test_positions_count_real_tokens_only():
    assert positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"the batch has no labels, only \['input_ids'\]"):
        Supervised.of({"input_ids": torch.zeros(1, 3, dtype=torch.long)})
    with pytest.raises(InputError, match=r"attention_mask and labels must both be \(B, T\), got \(1, 2\) and \(1, 3\)"):
        Supervised(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(InputError, match=r"values have shape \(1, 2, 4\), but the labels are \(1, 3\)"):
        Supervised(torch.zeros(1, 3, dtype=torch.long)).take(torch.zeros(1, 2, 4))
