"""Weights: the formula of the weight that a loss gives its tokens.

Read ``label_weights``, ``features`` (the quantities that a weight may depend on), ``weight_law`` and ``smooth_laws`` (the
formula), ``thresholds`` (exact steps and clips); ``class_weights``, ``positions``, ``batch_gates`` and ``batch_moments``
find weights by label id, by position and by the rest of the batch.
"""
