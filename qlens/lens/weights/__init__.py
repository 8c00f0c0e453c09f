"""Weights: how much each label is trusted, and the formula of that weight.

Read ``trust`` (the label's pull on each token), ``features`` (what a weight may depend on), ``weight_law`` and
``smooth_laws`` (the formula), ``thresholds`` (exact steps and clips), ``batch_gates``, ``positions``,
``label_weights`` (weights by token id) and ``centred`` (minus a mean).
"""
