"""Notes: how a loss was called, what else it does, and the tokens as it sees them.

Read ``account`` (all notes of a loss), ``effects`` (inputs and terms that its logit gradient alone does not show) and
``seen_tokens`` (the values that it is given, or makes of them).
"""
