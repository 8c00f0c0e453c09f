"""Element-wise kernels on one chunk of logits, from products to gradients in their place.

``plain`` is the reference, in torch, and runs everywhere. Where a GPU and Triton are at hand, the structures "label" and
mixture take ``raw_logits``: ``raw`` computes what ``plain`` does by the Triton kernels of ``triton_kernels``.
"""
