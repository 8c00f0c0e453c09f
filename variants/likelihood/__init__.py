"""Likelihood: losses of the label probability p_y alone; they differ in how far a label is trusted, or in what a negative
costs.
"""
