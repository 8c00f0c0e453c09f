"""``python -m qlens.analysis.benchmarks``."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == [
        "gpu"
    ]:  # takes options of its own, and runs where packages of the other benchmarks are missing
        from qlens.analysis.benchmarks.gpu.command import main

        main(sys.argv[2:])
    else:
        from qlens.analysis.benchmarks.bench import main

        main()
