"""Element-wise kernels on one chunk of logits, from products to gradients in their place.

``plain`` is in torch and runs everywhere. On the devices that ``raw_logits`` names (none by default), the structures "label"
and mixture are computed from raw logits: ``raw`` does what ``plain`` does by the Triton kernels of ``triton_kernels``.
"""
