"""Stubs for the model, the Trainer or the module that a loss takes.

Read ``stub_model`` (a model whose logits are the tokens'), ``trainers`` (compute_loss of a Trainer's class) and
``holders`` (objects that hold the model they train).
"""
