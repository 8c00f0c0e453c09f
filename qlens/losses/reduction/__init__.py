"""Reduction: the unreduced loss behind a scalar one.

Read ``unreduced`` (the loss per token), ``scalar`` (the count that a loss divides by), ``comparison`` (its gradients in
several layouts), ``divisors`` (the known counts) and ``two_terms`` (unusual reductions); ``random_losses`` is about losses
that draw numbers, ``advantages`` about losses that standardise their advantages.
"""
