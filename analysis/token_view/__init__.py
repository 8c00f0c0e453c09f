"""Token view: the targets of methods at every token of a text.

Read ``token_view`` (the entry), ``inputs`` (its arguments), ``summary`` (what is stored of a token), ``ranking`` (the order
of tokens and rows), ``page`` (the HTML file) and ``token_text`` (the text of single tokens).
"""

from qlens.analysis.token_view.token_view import TokenView, view

__all__ = ["TokenView", "view"]
