"""Distillation: divergences from a teacher's distribution."""
