"""Data: text and models from disk, as supervised examples, batches and tokens.

Read ``examples`` (rows to token ids and labels) with ``chat_templates``, ``collator`` (a padded batch), ``models``
(load models and tokenizers) with ``model_sizes``, ``compatibility`` and ``vocabularies`` (whether two fit together),
``base_models`` (without adapters), and ``from_text`` (Tokens).
"""

from qlens.data.examples import Encoded, encode, read_rows, split

__all__ = ["Encoded", "encode", "read_rows", "split"]
