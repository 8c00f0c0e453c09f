"""Preference: losses of pairs of sequences, one chosen and one rejected."""
