"""Identify: the registered method that has the gradient of a loss, with its parameters and factor.

Read ``method_search`` (the entry), ``matching`` (two gradients compared), ``parameter_search`` and ``parameter_fits``,
``near_identity`` (equal on most tokens), ``batch_factors`` with ``other_batches`` (equal up to a factor of the batch) and
``two_terms`` (sums of two methods); ``angles`` compares all methods with each other.
"""
