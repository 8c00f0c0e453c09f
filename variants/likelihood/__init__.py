"""Likelihood: losses of the label probability p_y with different label weights; some add negatives or entropy."""
