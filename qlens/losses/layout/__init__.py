"""Layout: the inputs that a loss takes, and their shapes: rows or batches, shifted inside or outside.

Read ``names`` and ``signature`` (inputs by parameter), ``layouts`` and ``views`` (the shapes and their tensors),
``candidates`` (the styles that a loss may have), ``trial`` (one style on a few rows), ``style_trials`` (the best of all) and
``layout_search`` (the style of a loss, remembered); ``past_searches`` and ``search_errors`` belong to it. ``pairing`` finds
losses that compare the texts of a batch, ``flattening`` losses of (B, T) that were given rows, ``wording`` describes a style.
"""
