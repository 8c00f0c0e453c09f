"""Notes: how a loss was called, what else it does, and the values of tokens that it uses.

Read ``account`` (all notes of a loss), ``effects`` (inputs and terms that its logit gradient alone does not show) and
``effective_tokens`` (the tokens with the values that it uses: one per text, standardised advantages, its own teacher).
"""
