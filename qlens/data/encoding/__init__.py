"""Encoding: samples as compact token ids with a mask of what is learned, and a report.

Read ``encoder`` (samples to ids: ``plain_text`` without a chat template, ``tokenizing`` for the borders between tokens),
``lengths`` (rows that are too long), ``compact`` (many examples in a few arrays), ``report`` and ``preview``.
"""
