"""Training: QTrainer, what a method needs while it trains, and what is logged.

Read ``trainer`` (QLossMixin, QTrainer), ``inputs`` (teacher, reference, old policy), ``metrics`` and ``measurements``
(what is logged), ``checkpoints`` (resuming), ``whole_batches`` and ``model_losses`` (losses that run the model
themselves); ``fitting`` runs a few steps, ``watch`` records targets while any model is trained.
"""

from qlens.training.fitting import fit
from qlens.training.trainer import QLossMixin, QTrainer
from qlens.training.watch import Watch

__all__ = ["QLossMixin", "QTrainer", "Watch", "fit"]
