"""The first rows of a ranking as a token view."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from qlens.analysis.ranking.export import rows_of
from qlens.analysis.ranking.ranking import Ranking
from qlens.analysis.token_view.token_view import TokenView, view
from qlens.registry import Variant


def view_first(
    ranking: Ranking,
    model: Any,
    tokenizer: Any,
    variants: Sequence[Variant | str | Callable] | None = None,
    *,
    top: int = 10,
    **options: Any,
) -> TokenView:
    """The rows among the first ``top`` of any order, or with one of its first tokens, under their numbers in the data.

    Args:
        ranking: of ``qlens.rank``.
        model, tokenizer, variants: those of the ranking.
        top: rows and tokens of every order.
        options: further arguments of ``qlens.view``, such as teacher and candidates.
    """
    numbers = sorted(ranking.first(top))
    shown = view(model, tokenizer, rows_of(ranking).select([number - 1 for number in numbers]), variants, **options)
    texts = tuple(replace(text, row=numbers[text.row - 1]) for text in shown.texts)
    return replace(shown, texts=texts, skipped=ranking.skipped, ranked=ranking)
