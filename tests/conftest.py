"""For every test: one thread, which is fastest for tiny models and the same on every machine."""

import torch

torch.set_num_threads(1)
