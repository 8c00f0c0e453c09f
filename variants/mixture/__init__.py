"""Mixture: a fixed share of the target is uniform or the student's own."""
