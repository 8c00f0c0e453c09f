"""Cached tokens: the probabilities of ``Tokens.cached`` are computed once, and no method writes on them."""

import torch
from cases import case
from torch.testing import assert_close

import qlens
from qlens.core.probes import trials
from qlens.lens.identify.matching import method_gradient, points
from qlens.registry import methods

SUMS = (
    "log_probs",
    "probs",
    "label_log_probs",
    "label_probs",
    "rest_log_probs",
    "rest",
    "label_grad",
    "others",
    "one_hot",
)
MODELS = ("reference", "teacher", "old", "second")


def test_probabilities_are_kept_and_equal():
    tokens = trials(torch.float64)
    cached = tokens.cached()
    for name in SUMS:
        assert_close(getattr(cached, name), getattr(tokens, name), rtol=0, atol=0)
        assert getattr(cached, name) is getattr(cached, name)
    for name in MODELS:
        assert_close(cached.log_probs_of(name), tokens.log_probs_of(name), rtol=0, atol=0)
        assert cached.log_probs_of(name) is cached.log_probs_of(name)
    assert cached.unweighted() is cached.unweighted() and cached.unweighted().cache is not None
    p = tokens.label_probs
    assert_close(tokens.rest, 1 - p, rtol=1e-9, atol=1e-12)
    assert_close(tokens.label_grad, tokens.probs - tokens.one_hot, rtol=1e-9, atol=1e-12)


def test_changed_tokens_do_not_share_the_probabilities():
    tokens = qlens.probes(torch.float64).cached()
    before = tokens.log_probs
    leaf = tokens.logits.clone().requires_grad_()
    assert tokens.with_logits(leaf).log_probs.requires_grad and tokens.cached().cache == {}
    for other in (tokens.with_logits(2 * leaf), tokens[3:], tokens.replace(logits=2 * tokens.logits), tokens.copied()):
        assert other.cache is None and other.log_probs is not before
    assert tokens.log_probs is before


def test_every_method_has_the_same_gradient_and_writes_on_nothing():
    tokens = trials(torch.float64)
    cached = tokens.cached()
    for method in methods().values():
        for variant in points(method):
            with case(variant.spec):
                expected, actual = method_gradient(variant, tokens), method_gradient(variant, cached)
                assert (expected is None) == (actual is None)
                if expected is not None and actual is not None:
                    assert_close(actual, expected, rtol=0, atol=0)
    unweighted = cached.unweighted()
    for name in SUMS:
        assert_close(getattr(unweighted, name), getattr(tokens, name), rtol=0, atol=0)
    for name in MODELS:
        assert_close(unweighted.log_probs_of(name), tokens.log_probs_of(name), rtol=0, atol=0)
