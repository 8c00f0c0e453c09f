"""Preview: examples as text, with what is learned marked."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from qlens.core.supervised import IGNORE

BEGIN, END = "⟦", "⟧"


def marked_text(example: Mapping[str, Sequence[int]], tokenizer: Any) -> str:
    """The text of an example; what is learned is between ⟦ and ⟧.

    Args:
        example: ``input_ids`` and ``labels``.
        tokenizer: of the model.
    """
    parts = []
    for learned, tokens in groupby(
        zip(example["input_ids"], example["labels"], strict=True), key=lambda pair: pair[1] != IGNORE
    ):
        text = tokenizer.decode(
            [token for token, _ in tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        parts.append(f"{BEGIN}{text}{END}" if learned else text)
    return "".join(parts)


class Preview(str):
    """Text that shows itself as it is."""

    def __repr__(self) -> str:
        return str(self)


def preview(examples: Sequence[Mapping[str, Any]], tokenizer: Any, count: int) -> Preview:
    """The first examples as marked text, each under a line with its number, its tokens and its columns."""
    parts = []
    for number, example in enumerate(examples[:count], 1):
        learned = sum(label != IGNORE for label in example["labels"])
        columns = [f"{name} {value}" for name, value in example.items() if name not in ("input_ids", "labels")]
        head = ", ".join([f"{len(example['input_ids'])} tokens", f"{learned} learned", *columns])
        parts.append(f"--- {number}: {head}\n{marked_text(example, tokenizer)}")
    return Preview("\n".join(parts))
