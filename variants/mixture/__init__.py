"""Mixture: the label mixed in fixed shares with the uniform or the student's own distribution."""
