"""Reference: ratios to, or penalties against, the initial model, an old policy or a second dropout pass."""
