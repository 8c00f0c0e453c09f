"""Losses: any loss as somebody wrote it, called as it wants to be called, its reduction undone.

Read ``calling`` (one call) and ``return_values``, then the packages ``layout`` (which inputs, in which shape) and
``reduction`` (what a scalar loss divides by). ``user_files`` and ``user_code`` load and run what users write,
``states`` and ``replay`` restore what it keeps from call to call, ``graphs`` and ``leaves`` say which gradients it
has; ``stubs`` serves losses that want a whole model, ``remarks`` and ``side_effects`` say what else they do.
"""
