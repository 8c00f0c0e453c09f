"""Token view: what each target wants of each token of a text.

``token_view`` is the entry, ``summary`` what is kept of a token, ``ranking`` the order of tokens and rows, ``page``
the HTML file, ``token_text`` the text of single tokens.
"""

from qlens.analysis.token_view.token_view import TokenView, view

__all__ = ["TokenView", "view"]
