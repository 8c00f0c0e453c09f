"""Parameter: penalties on the weights of a model, beside a loss of its tokens."""
