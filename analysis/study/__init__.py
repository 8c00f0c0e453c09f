"""Study: the result of a comparison.

``study`` holds it, ``frames`` are its tables, ``stats`` the statistics; ``tables`` and ``report`` print it.
"""

from qlens.analysis.study.study import Study

__all__ = ["Study"]
