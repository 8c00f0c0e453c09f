"""Findings: what is read off a gradient. Where it pulls, by which law, how far it reaches, what it leaks, whose it is."""
