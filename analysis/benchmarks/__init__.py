"""Benchmarks that anybody can repeat: ``python -m qlens.analysis.benchmarks step``, ``jobs``, ``lens`` or ``engine``."""
