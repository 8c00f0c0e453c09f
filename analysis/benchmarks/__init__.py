"""Benchmarks: ``python -m qlens.analysis.benchmarks step``, ``jobs``, ``lens`` or ``engine``.

``bench`` is the command line with training steps and jobs, ``engine`` and ``lens`` measure those packages, ``real_text``
the lens on a model and data of one's own (``lens --model DIR --data FILE``); ``baselines`` are
the alternatives to the engine.
"""
