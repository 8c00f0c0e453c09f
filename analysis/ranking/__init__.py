"""Ranking: rows of data and their tokens in the order of their label weight, for data sets of any size.

Read ``passes`` (the entry ``rank``), ``scores`` (the numbers kept of a token), ``shards`` (the files that make it
resumable), ``orders`` (how scores become ranks), ``ranking`` (the result), ``row_texts`` (the texts shown of it) and
``export`` (the data with weights, or without the least trusted rows).
"""

from qlens.analysis.ranking.passes import rank
from qlens.analysis.ranking.ranking import Ranking

__all__ = ["Ranking", "rank"]
