"""A token view of random logits over hostile and odd tokens."""

import pandas as pd
import torch

import qlens
from qlens.analysis.token_view.summary import summarise
from qlens.analysis.token_view.token_view import Text, TokenView
from qlens.analysis.token_view.vocabulary import VocabularyTotals

SPECS = ["sft", "dft", "gem", "kd"]
HOSTILE = [
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "</script><b>bold</b>",
    "\u202eevil",
    "<!--",
    "{{script}}",
    "&amp;",
]
PIECES = ["<s>", "a", " bc", "\n", "שלום", "\udcf0\udc9f", "\udc98\udc80", "😀", "\u200b", *HOSTILE]
ROWS = [[0, 1, 2, 9, 10, 3, 11, 12, 4, 5, 6, 7, 1], [0, 13, 14, 15, 8, 2, 2, 1], [0, 1, 2]]
PROMPT = 2  # tokens of every row that are not supervised


def example_view(rows=ROWS, pieces=PIECES, specs=SPECS, candidates=6, training=False):
    """A view of made-up logits over these pieces; ``training`` adds a second checkpoint, a column, segments and totals."""
    draw = torch.Generator().manual_seed(3)
    texts = tuple(Text(n, tuple(row), tuple(range(PROMPT, len(row)))) for n, row in enumerate(rows, 1))
    labels = torch.tensor([row[at] for text, row in zip(texts, rows, strict=True) for at in text.places])
    logits, teacher = (2 * torch.randn(len(labels), len(pieces), generator=draw) for _ in range(2))
    tokens = qlens.Tokens(logits=logits, teacher=teacher, labels=labels)
    options, extra = {}, {}
    if training:
        options = {
            "after": tokens.with_logits(2 * torch.randn(logits.shape, generator=draw)),
            "totals": VocabularyTotals(),
        }
        segment = ["thinking" if at % 3 else "answer" for at in range(len(labels))]
        reward = [float(text.row) for text in texts for _ in text.places]
        extra = {"columns": pd.DataFrame({"segment": segment, "reward": reward}), "totals": options["totals"]}
    summary = summarise(tokens, [qlens.get(spec) for spec in specs], candidates, **options)
    return TokenView(texts, summary, pieces, {9: "no supervised token"}, **extra)
