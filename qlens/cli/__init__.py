"""The command line: verbs, their options, and errors.

Read ``app``, ``methods`` and ``view`` (the verbs), ``options`` (what they share), ``inputs`` (models and data) and ``console``
(errors as one line).
"""

from qlens.cli.app import main

__all__ = ["main"]
