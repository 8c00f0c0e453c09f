"""Training templates of TRL: for some families a template with generation marks that leaves earlier turns as they are.

A tokenizer's template is of a family if it writes the same as the family's template does in TRL, whatever its text: templates
are published in several versions.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlens.core.errors import InputError
from qlens.data.chat_templates import limits
from qlens.data.chat_templates.rendering import Renderer, Turns
from qlens.data.rows.bad_rows import BadRow

SUFFIX = "_training"

_ASK, _ANSWER = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "g", "parameters": {"type": "object", "properties": {}}},
}
CONVERSATIONS: tuple[tuple[Turns, Any], ...] = (
    ([_ASK, _ANSWER], None),
    ([{"role": "system", "content": "e"}, _ASK, _ANSWER, _ASK, _ANSWER], None),
    ([_ASK, {**_ANSWER, "reasoning_content": "h"}, _ASK, {**_ANSWER, "reasoning_content": "i"}], None),
    ([_ASK, _CALL, {"role": "tool", "name": "f", "content": "j"}, _ANSWER], [_TOOL]),
)
"""Conversations by which a family is told; what the training template writes of the first begins alike."""


def training_template(tokenizer: PreTrainedTokenizerBase, own: Renderer) -> Renderer | None:
    """TRL's training template for the family of a tokenizer's template, None where TRL knows none."""
    try:
        with limits.time_limit(limits.SECONDS):
            written = _written(own)
            for original, training in _families():
                if original.read_text(encoding="utf-8") == own.template() or _alike(tokenizer, original, written):
                    renderer = Renderer(tokenizer, training.read_text(encoding="utf-8"))
                    return renderer if (_written(renderer)[0] or "").startswith(written[0] or "") else None
    except limits.TimeUp:
        return None
    return None


def _families() -> Iterator[tuple[Path, Path]]:
    """Files of the templates that TRL has a training template for, and of these."""
    package = importlib.util.find_spec("trl")  # not imported: the files are enough
    for place in (package.submodule_search_locations or ()) if package else ():
        for training in sorted((Path(place) / "chat_templates").glob(f"*{SUFFIX}.jinja")):
            original = training.with_name(training.name.replace(SUFFIX, ""))
            if original.is_file():
                yield original, training


def _alike(tokenizer: PreTrainedTokenizerBase, original: Path, written: list[str | None]) -> bool:
    """Whether a family's template writes the same; most are told by the first conversation already."""
    try:
        renderer = Renderer(tokenizer, original.read_text(encoding="utf-8"))
    except InputError:
        return False
    pairs = zip(CONVERSATIONS, written, strict=True)
    return written[0] is not None and all(_text(renderer, *each) == text for each, text in pairs)


def _written(renderer: Renderer) -> list[str | None]:
    return [_text(renderer, *each) for each in CONVERSATIONS]


def _text(renderer: Renderer, turns: Turns, tools: Any) -> str | None:
    """What a template writes, None where it refuses."""
    try:
        return renderer.text(turns, tools)
    except BadRow:
        return None
