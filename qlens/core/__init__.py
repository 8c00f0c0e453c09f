"""Core: tokens, targets and the arithmetic between them; nothing here knows a method, a loss or a model.

Read ``tokens`` (what a loss may look at), ``target`` (the distribution Q with its scale) and ``target_metrics`` (its
figures); then ``autograd`` (logit gradients), ``scales``, ``segments`` (sums over sequences and pairs),
``supervised`` (-100, shift and padding), ``probes`` and ``trial_tokens`` (tokens to try losses on), and
``deprecation`` (old names).
"""
