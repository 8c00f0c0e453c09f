"""Decompose: a gradient as a sum of pulls toward named distributions, g = sum_j w_j (p - R_j), and what else it depends on.

Read ``mixture`` and ``mixture_search`` (the decomposition) with ``residuals`` (the distributions) and
``weight_functions`` (the formulas of the weights), ``shift_variance`` and ``without_softmax`` (raw logits), ``dependence``
with ``perturbation``, ``batch_changes`` and ``detached`` (other tokens, stop-gradients), ``label_offset``,
``unused_inputs`` and ``vocabulary_factors``.
"""
