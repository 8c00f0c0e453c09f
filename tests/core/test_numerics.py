"""Softmax, top k and divergences, against torch and by hand."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from qlens.core.numerics import expectation, kl, log_mix, top_ids


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=4), k=st.integers(1, 8))
def test_the_top_k_are_those_of_a_stable_sort(rows, k):
    values = torch.tensor(rows, dtype=torch.float64).masked_fill(torch.tensor(rows) == 0, -torch.inf)
    expected = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top_ids(values, k).sort(dim=-1).values, expected.sort(dim=-1).values)


def test_exact_zeros_add_nothing():
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    assert_close(expectation(p, p.log()), p.new_tensor([0.5]).log())
    other = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64)
    assert_close(kl(p.log(), other.log()), (0.5 * (p.new_tensor([2.0]).log() + p.new_tensor([2 / 3]).log())))
    assert bool(kl(other.log(), torch.tensor([[1.0, 0.0, 0.0]]).double().log()).isinf().all())
    mixed = log_mix(p.log(), torch.tensor([[0.0, 1.0, 0.0]]).double().log(), 0.4)
    assert_close(mixed.exp(), p.new_tensor([[0.2, 0.8, 0.0]]))
