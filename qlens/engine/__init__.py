"""Engine: a method's loss and gradients from hidden states and a head, a chunk of logits at a time.

One training step, from the top; ``qlens.training`` holds the first half of this list, this package the second:

1. ``training/loss_mixin.py`` QLossMixin.compute_loss: a micro-batch comes in.
2. ``data/supervised_batch.py`` SupervisedBatch: shift, mask and columns of the data, once.
3. ``training/step/student.py`` Student.run: hidden states and head (``models/backbone.py``), or whole logits.
4. ``training/step/inputs.py`` MethodInputs.gather: other models' predictions and fields at the supervised rows.
5. ``training/step/row_losses.py`` fused_row_loss; or plain_row_loss, by autograd from whole logits, where it ends.
6. ``fused.py`` fused_pass: checks (``fused_inputs.py``), and verification of a user's method (``verification/``).
7. ``chunked.py`` chunked_pass: the loop over chunks of logits.
8. ``structures.py`` gradient_function: ``label_only.py``, ``mixtures.py`` or ``dense.py``, by the declared structure.
9. ``kernels/``: softmax and gradient in place of the logits.
10. ``accumulation.py`` GradientSums.add: the products that give the gradients of hidden states and head.

``heads.py`` holds other models as logits, heads or top-k; ``row_inputs.py`` the types of steps 6 to 9; ``finite_values.py``
refuses NaN.
"""

from qlens.engine.fused import fused_loss, fusible, why_whole_logits
from qlens.engine.heads import Head, TopK

__all__ = ["Head", "TopK", "fused_loss", "fusible", "why_whole_logits"]
