"""Tokens: the inputs of a loss at N supervised positions, and the checks of its fields."""

from qlens.core.tokens.tokens import MODELS, PER_TOKEN, Tokens

__all__ = ["MODELS", "PER_TOKEN", "Tokens"]
