"""Data sets of the trainers: rows of text to examples, columns beside the tokens, pairs.

Read ``rows`` (a data set of text is encoded), ``columns`` (values per token through TRL's preparation and packing) and
``pairs`` (chosen and rejected answers, encoded and padded by TRL).
"""
