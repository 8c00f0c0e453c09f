"""Reduction: a scalar loss, undone to one value per token.

Read ``unreduced`` (the loss per token), ``scalar`` (what a scalar loss divides by), ``divisors`` (the counts it may be) and
``random_losses`` (losses that draw numbers); ``advantages`` says what a loss makes of its advantages over a batch.
"""
