"""Decompose: a gradient as pulls toward named distributions, and the law of each pull.

Read ``mixture`` and ``mixture_search`` (the fewest pulls that explain a gradient) with ``residuals`` (the
distributions), ``pulls``, ``raw_logits`` and ``uncoupled`` (losses that see more than the softmax), ``dependence`` on
other tokens with ``batch_changes``, ``shifts`` and ``vocabulary_factors``.
"""
