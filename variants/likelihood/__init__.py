"""Likelihood: losses of the label probability p_y, with different label weights; some also weigh by negatives or entropy."""
