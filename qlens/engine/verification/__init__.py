"""Verification of a user's method before its rows are cut into chunks.

Read ``declarations`` (structure, target and scope as the card declares them) with ``row_dependence`` (rows that depend on
each other), ``batch_layout`` (losses that depend on places in texts) and ``fingerprints`` (state that a verdict depends on).
"""
