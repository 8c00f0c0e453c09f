"""Data: text and models from disk, as supervised examples, batches and tokens.

Read ``rows`` (JSON Lines) and ``examples`` (token ids and labels) with ``chat_templates``; ``collator`` (padded batches) and
``supervised_batch`` (their supervised rows); ``models`` (load models and tokenizers) with ``model_sizes``,
``compatibility`` and ``vocabularies`` (whether two fit together) and ``base_models`` (a model without its adapters);
``from_text`` (Tokens of texts).
"""

from qlens.data.examples import Encoded, encode
from qlens.data.rows import read_rows, split

__all__ = ["Encoded", "encode", "read_rows", "split"]
