"""Losses of hidden states beyond their logits, and invalid cards and tokens, are refused."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

import qlens
from qlens.core.errors import InputError
from qlens.data.models import check_token_ids


def rows(hidden, head, labels):
    return cross_entropy(hidden @ head.T, labels, reduction="none")


def with_penalty(hidden, head, labels):
    return rows(hidden, head, labels) + 0.1 * hidden.square().mean(-1)


def cosine(hidden, head, labels):
    return 1 - cosine_similarity(hidden, head[labels], dim=-1)


def with_head_penalty(hidden, head, labels):
    return rows(hidden, head, labels) + 0.1 * head.square().mean()


def test_a_loss_of_hidden_states_beyond_their_logits_is_refused():
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(12, 8, generator=draw), torch.randn(20, 8, generator=draw)
    labels = torch.randint(20, (12,), generator=draw)
    for loss in (with_penalty, cosine, with_head_penalty):
        with pytest.raises(InputError, match="beyond their logits"):
            qlens.fused_loss(loss, hidden.requires_grad_(), head, labels)
        with pytest.raises(InputError, match="beyond their logits"):
            qlens.explain(loss)
    torch.testing.assert_close(
        qlens.fused_loss(rows, hidden, head, labels), cross_entropy(hidden @ head.T, labels), check_dtype=False
    )


def test_cards_and_tokens_that_do_not_fit_are_refused():
    def loss(logits, labels):
        return cross_entropy(logits, labels, reduction="none")

    for name, card, message in (
        ("class", {}, "identifier"),
        ("ill_modes", {"modes": ["v1"]}, "modes must be a dict"),
        ("ill_point", {"modes": {"v1": 1}}, "modes must be a dict"),
        ("ill_needs", {"needs": ("logits",)}, "needs names logits"),
    ):
        with pytest.raises(InputError, match=message):
            qlens.register(name, **card)(loss)
    for tokens in ("x", 3, torch.zeros(2, 4)):
        with pytest.raises(InputError, match="tokens must be"):
            qlens.explain(loss, tokens)


def test_token_ids_outside_the_embedding_are_refused():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(20, 2)

        def get_input_embeddings(self):
            return self.embedding

    check_token_ids(Model(), {"input_ids": torch.tensor([[0, 19]])})
    for wrong in (20, -3):
        with pytest.raises(InputError, match=f"input_ids hold {wrong}, outside the vocabulary 0..19"):
            check_token_ids(Model(), {"input_ids": torch.tensor([[0, wrong]])})
