"""Sums over sequences and pairs, against loops."""

import pytest
import torch
from torch.testing import assert_close

from qlens import InputError, get
from qlens.core.segments import Groups, Pairs
from qlens.core.tokens import Tokens
from qlens.testing import random_tokens


def test_totals_means_and_sizes_are_those_of_a_loop():
    ids = torch.tensor([9, 4, 9, 9, -1])
    values = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0], dtype=torch.float64, requires_grad=True)
    groups = Groups(ids)
    for at, group in enumerate(ids.tolist()):
        own = [float(v.detach()) for v, i in zip(values, ids, strict=True) if i == group]
        assert float(groups.total(values)[groups.index[at]].detach()) == sum(own)
        assert_close(float(groups.mean(values)[groups.index[at]].detach()), sum(own) / len(own))
        assert int(groups.size(values.detach())[at]) == len(own)
    groups.mean(values).sum().backward()
    assert_close(values.grad, torch.tensor([1 / 3, 1.0, 1 / 3, 1 / 3, 1.0], dtype=torch.float64))
    assert groups.number == 3 and Groups(ids[:0]).number == 0


def test_pairs_add_up_each_side():
    tokens = random_tokens(24, 5)
    pairs, values = Pairs.of(tokens), torch.arange(24.0, dtype=torch.float64)
    chosen, rejected = pairs.totals(values)
    for at, pair in enumerate(tokens.pair.unique()):
        own = tokens.pair == pair
        assert_close(chosen[at], values[own & tokens.chosen].sum())
        assert_close(rejected[at], values[own & ~tokens.chosen].sum())
        assert_close(pairs.means(values)[0][at], values[own & tokens.chosen].mean())
    assert_close(pairs.signed(chosen, rejected), torch.where(tokens.chosen, chosen[pairs.index], rejected[pairs.index]))
    rows = pairs.split(chosen)
    assert_close(pairs.pairs.total(rows), chosen)
    assert_close(rows[tokens.pair == 0], (chosen[0] / 8).expand(8))


def test_half_a_pair_is_refused():
    for side in ("chosen", "rejected"):
        pair, chosen = torch.tensor([3, 3, 5]), torch.tensor([True, False, side != "chosen"])
        tokens = Tokens(logits=torch.zeros(3, 4), labels=torch.zeros(3, dtype=torch.long), pair=pair, chosen=chosen)
        for function in (Pairs.of, get("simpo").loss, get("orpo").loss, get("simpo").target):
            with pytest.raises(InputError, match=f"pair 5 has no token of its {side} sequence"):
                function(tokens)
