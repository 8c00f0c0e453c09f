"""Engine: a method's loss and gradients from hidden states and a head, a few rows of logits at a time.

A training step goes ``qlens.training.trainer`` (compute_loss) -> ``qlens.core.supervised`` (shift, mask) ->
``backbone`` (hidden states and head of a model) -> ``qlens.training.inputs`` (the method's other inputs) -> ``fused``
(fused_loss) -> ``chunked`` (the loop over rows) -> ``row_gradients`` (one function per declared structure) ->
``kernels``. ``heads`` holds other models as logits, heads or top-k, ``label_only`` the two-entry vocabulary,
``batch_losses`` the losses of whole batches; ``verification`` is what a user's method is checked for, ``packing`` and
``forward`` call models, ``finite_values`` refuses NaN.
"""

from qlens.engine.fused import fused_loss, fusible, why_whole_logits
from qlens.engine.heads import Head, TopK

__all__ = ["Head", "TopK", "fused_loss", "fusible", "why_whole_logits"]
