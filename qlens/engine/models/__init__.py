"""Causal language models as the engine runs them.

Read ``forward`` (a pass without gradients), ``backbone`` (a model as hidden states and a linear head) with
``backbones`` (those of a run), ``packing`` (several texts in one row) and ``causality`` (models that look ahead).
"""
