"""Entropy: weights by, or a pull on, the entropy of the student's own distribution."""
