"""Policy: policy-gradient losses with an advantage per token."""
