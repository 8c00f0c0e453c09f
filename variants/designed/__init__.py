"""Designed: targets that are written down first, and losses that follow from them."""
