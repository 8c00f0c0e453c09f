"""Reference: ratios to, or penalties against, another pass: the initial model, an old policy or a second dropout mask."""
