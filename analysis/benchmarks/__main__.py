"""``python -m qlens.analysis.benchmarks``."""

from qlens.analysis.benchmarks.bench import main

if __name__ == "__main__":
    main()
