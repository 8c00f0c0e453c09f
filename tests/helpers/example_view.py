"""A token view of random logits over hostile and odd tokens."""

import torch

import qlens
from qlens.analysis.token_view.summary import summarise
from qlens.analysis.token_view.token_view import Text, TokenView

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


def example_view(rows=ROWS, pieces=PIECES, specs=SPECS, candidates=6):
    """A view of made-up logits over these pieces."""
    draw = torch.Generator().manual_seed(3)
    texts = tuple(Text(n, tuple(row), tuple(range(PROMPT, len(row)))) for n, row in enumerate(rows, 1))
    labels = torch.tensor([row[at] for text, row in zip(texts, rows, strict=True) for at in text.places])
    logits, teacher = (2 * torch.randn(len(labels), len(pieces), generator=draw) for _ in range(2))
    tokens = qlens.Tokens(logits=logits, teacher=teacher, labels=labels)
    return TokenView(
        texts, summarise(tokens, [qlens.get(spec) for spec in specs], candidates), pieces, {9: "no supervised token"}
    )
