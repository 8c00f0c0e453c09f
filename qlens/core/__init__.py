"""Core: tokens, targets and their arithmetic; nothing here knows a method, a loss or a model.

Read ``tokens`` (the inputs of a loss), ``target`` (the distribution Q with its scale) and ``numerics`` (softmax and
divergences); then ``autograd`` (logit gradients), ``scales`` (label weight, natural scale, tolerances), ``segments``
(sums over sequences and pairs) and ``supervised`` (-100, shift and padding). ``probes`` are
tokens to try losses on; ``errors``, ``files``, ``display``, ``progress``, ``random_draws`` and ``deprecation`` serve every
package.
"""
