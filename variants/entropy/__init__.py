"""Entropy: label weights from the entropy of the student, and penalties on it."""
