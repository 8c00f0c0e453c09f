"""Losses: calls of any user-written loss, and the unreduced loss behind a scalar one.

Read ``calling`` (one call), ``arguments`` (the values of its inputs) and ``return_values``, then the packages ``layout``
(the inputs that a loss takes, and their shapes) and ``reduction`` (the count that a scalar loss divides by). ``user_files``
and ``user_code`` load and run users' code, ``states`` and ``replay`` restore its state, ``graphs`` and ``leaves`` look at
its graph; ``stubs`` has models for losses that take one, ``notes`` describes what else a loss does.
"""
