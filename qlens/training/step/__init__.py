"""The parts of one training step, in the order in which ``QLossMixin.compute_loss`` calls them.

Read ``student`` (the trained model's forward pass), ``inputs`` (what else a method needs), ``row_losses`` (fused_row_loss
and plain_row_loss, on supervised rows); then ``batch_losses`` (losses that see whole batches), ``model_losses`` (losses that
run the model themselves), ``router_loss`` and ``loss_parameters``.
"""
