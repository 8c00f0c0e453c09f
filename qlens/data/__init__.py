"""Data: text and models from disk, as supervised examples, batches and tokens.

Read ``rows`` (files, data sets and the shapes of rows) and ``examples`` (token ids and labels, by ``encoding`` and
``chat_templates``); ``collator`` (padded batches) and ``supervised_batch`` (their supervised rows); ``models`` (load models and
tokenizers) with ``model_folders`` and ``model_sizes``, ``compatibility`` and ``vocabularies`` (whether two fit together) and
``base_models`` (a model without its adapters); ``from_text`` (Tokens of texts).
"""

from qlens.data.examples import Encoded, encode
from qlens.data.rows import load_rows, split

__all__ = ["Encoded", "encode", "load_rows", "split"]
