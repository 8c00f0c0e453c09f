"""Triton's interpreter, which runs kernels on a CPU; it has to be chosen before Triton is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
