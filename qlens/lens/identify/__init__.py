"""Identify: the registered method that has the gradient of a loss, with its parameters and factor.

Read ``naming`` (the entry), ``matching`` (gradients compared), ``parameter_search`` and ``parameter_fits``,
``near_identity`` (equal on most tokens), ``batch_statistics`` (equal up to a factor of the batch) and ``two_terms``
(sums of two).
"""
