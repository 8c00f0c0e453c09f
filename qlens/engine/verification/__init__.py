"""Verification: what a user's method is checked for before it is cut into chunks of rows.

Read ``declarations`` (structure, target and scope as the card declares them) with ``row_dependence`` (rows that depend
on each other) and ``marks`` (state that makes a verdict old), and ``causality`` (models that look ahead).
"""
