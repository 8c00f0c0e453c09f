"""Benchmarks: ``python -m qlens.analysis.benchmarks step``, ``jobs``, ``lens`` or ``engine``.

``bench`` is the command line with training steps and jobs, ``engine`` and ``lens`` measure those packages, ``baselines`` are
the alternatives to the engine.
"""
