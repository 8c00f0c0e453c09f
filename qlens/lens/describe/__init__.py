"""Describe: the text of an explanation.

``screen`` prints it, ``summary`` is its paragraph, ``findings`` its lines of detail; ``coefficients`` words the trust and
the label weight for both.
"""
