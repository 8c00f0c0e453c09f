"""Stubs: what stands in for a model, a Trainer or a module where a loss wants one.

Read ``stub_model`` (a model whose logits are the tokens'), ``trainers`` (compute_loss of a Trainer's class) and
``holders`` (objects that hold the model that they train).
"""
