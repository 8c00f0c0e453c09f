"""Layout: which inputs a loss asks for, and in which shape: rows, batches, shifted inside or outside.

Read ``names`` and ``signature`` (parameters to inputs), ``layouts`` (the shapes), ``candidates`` (the likely ones) and
``layout_search`` (which one a loss wants, by ``trial`` on a few rows), ``pairing`` (losses that compare texts of their
batch); ``wording`` says which was taken.
"""
