"""Training: QTrainer, QSFTTrainer, Watch and fit.

One training step, from the top (the second half of the list is in ``qlens.engine``):

1. ``loss_mixin.py`` QLossMixin.compute_loss.
2. ``data/supervised_batch.py`` SupervisedBatch: shift, mask and columns of the data, once.
3. ``step/student.py`` Student.run: hidden states and backbone of the trained model, or whole logits.
4. ``step/inputs.py`` MethodInputs.gather: teacher, reference, old policy, second pass, negatives, columns.
5. ``step/row_losses.py`` fused_row_loss (on to ``qlens.engine.fused``) or plain_row_loss (autograd).

Losses of other forms leave the list early: ``step/batch_losses.py`` after 4, ``step/model_losses.py`` after 2.

``trainer`` is QTrainer and ``sft_trainer`` QSFTTrainer (TRL); ``datasets`` makes examples of their rows; ``sources`` names what
a teacher or reference may be; ``metrics``, ``metrics_logging`` and ``update_norm`` are what is logged; ``checkpoints`` resumes a
run; ``evaluation_data`` checks evaluation sets; ``fitting`` runs a few steps; ``watch`` records targets in any run.
"""

from qlens.training.fitting import fit
from qlens.training.loss_mixin import QLossMixin
from qlens.training.trainer import QTrainer
from qlens.training.watch import Watch

__all__ = ["QLossMixin", "QTrainer", "Watch", "fit"]
