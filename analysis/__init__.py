"""Comparing, statistics, plots, report and benchmarks."""

if __name__ != "qlens.analysis":
    raise ImportError("import qlens.analysis, not analysis: from the repository root it would be a second copy")
