"""GPU benchmark: ``python -m qlens.analysis.benchmarks gpu --out DIR``.

``command`` runs the parts, each within a time limit of its own, and writes the JSON after every case: ``correctness`` against
float64, ``elementwise`` (plain torch, torch.compile and Triton on one chunk), ``kernels`` (time and peak memory beside the
alternatives of ``ways``), ``trace`` (host synchronisations and kernels of one pass) and ``steps`` of QTrainer. ``report``
prints and draws them.
"""
