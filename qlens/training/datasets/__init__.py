"""Data sets of the trainers: rows of text to examples, columns beside the tokens, pairs, prompts of a teacher.

Read ``rows`` (a data set of text is encoded), ``pairs`` (chosen and rejected answers, encoded and padded by TRL),
``privileged`` (a teacher that sees more than the student) and ``columns`` (values per token through TRL's preparation,
packing and padding; it imports TRL, and only ``sft_trainer`` imports it).
"""
