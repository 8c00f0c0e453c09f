"""Reference: ratios to, or a penalty against, another pass of the model: the one it started from, an old policy, a second
dropout mask.
"""
