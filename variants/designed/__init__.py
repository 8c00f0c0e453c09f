"""Designed: an explicit target, and the cross-entropy toward it."""
