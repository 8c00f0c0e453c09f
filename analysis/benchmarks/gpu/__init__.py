"""GPU benchmark: ``python -m qlens.analysis.benchmarks gpu --out DIR``.

``command`` runs the parts, each within a time limit of its own, and writes the JSON after every case: ``correctness`` against
float64, ``kernels`` (time and peak memory beside the alternatives of ``ways``), ``steps`` of QTrainer and ``trace`` (host
synchronisations and kernels of one pass). ``report`` prints and draws them.
"""
