"""Samples: what there is to learn in a row, as turns or as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlens.core.errors import brief
from qlens.data.rows.bad_rows import BadRow, check_text
from qlens.data.rows.turns import Turn, read_tools, read_turns

OPTIONAL = ("system", "tools")
"""Columns that belong to every shape with turns."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation of which some turns are learned, or a text that is learned from ``start`` on.

    Args:
        turns: up to the last one that is learned; empty for a text.
        learned: the indices of the assistant's turns that are learned.
        tools: JSON schemas for the chat template.
        text: of a text.
        start: the character of the text where what is learned begins.
        ends: whether an end token follows the text and is learned.
        columns: weight, critical, ... (``qlens.data.collator.COLUMNS``).
    """

    turns: list[Turn] = field(default_factory=list)
    learned: tuple[int, ...] = ()
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    start: int = 0
    ends: bool = False
    columns: dict[str, Any] = field(default_factory=dict)


def whole_text(row: Mapping[str, Any], column: str) -> list[Sample]:
    """A text, all of it learned."""
    return [Sample(text=check_text(row[column], column))]


def conversation(row: Mapping[str, Any], column: str) -> list[Sample]:
    """Messages of which every assistant turn is learned."""
    return [sample_of(read_turns(row[column], column), 0, row, column)]


def continuation(row: Mapping[str, Any], prompt: str, completion: str) -> list[Sample]:
    """A prompt and a completion, each a string or a list of turns; the assistant's turns of the completion are learned."""
    before = turns_of(row[prompt], prompt, "user")
    return [sample_of([*before, *turns_of(row[completion], completion, "assistant")], len(before), row, completion)]


def instruction(row: Mapping[str, Any], prompt: str = "instruction", completion: str = "output") -> list[Sample]:
    """An instruction with an input below it, after earlier pairs of instruction and output."""
    before: list[Turn] = []
    history = row.get("history") or ()
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise BadRow(
                "wrong types", f"history {number} must be a pair of instruction and output, got {brief(pair, 60)}"
            )
        before += turns_of(pair[0], f"history {number}", "user") + turns_of(pair[1], f"history {number}", "assistant")
    below = check_text(row.get("input") or "", "input")
    asked = check_text(row[prompt], prompt)
    before.append({"role": "user", "content": f"{asked}\n{below}" if below else asked})
    return [sample_of([*before, *turns_of(row[completion], completion, "assistant")], 0, row, completion)]


def preference(
    row: Mapping[str, Any], chosen: str = "chosen", rejected: str = "rejected", prompt: str = "prompt"
) -> list[Sample]:
    """The chosen and the rejected answer to one prompt, which may be their common beginning instead of a column."""
    columns = (chosen, rejected)
    if row[chosen] == row[rejected]:
        raise BadRow("chosen is rejected", f"{chosen} and {rejected} are the same: no preference to learn")
    if row.get(prompt) is None and all(isinstance(row[name], str) for name in columns):
        samples = _texts_with_prompt([check_text(row[name], name) for name in columns], columns)
    else:
        answers = [turns_of(row[name], name, "assistant") for name in columns]
        if row.get(prompt) is None:
            before = answers[0][: _common(*answers)]
        else:
            before = turns_of(row[prompt], prompt, "user")
        answers = [turns[len(before) :] if turns[: len(before)] == before else turns for turns in answers]
        for name, turns in zip(columns, answers, strict=True):
            if not turns:
                raise BadRow("empty completion", f"{name} is all prompt: it ends where the other one goes on")
        samples = [
            sample_of([*before, *turns], len(before), row, name) for turns, name in zip(answers, columns, strict=True)
        ]
    for sample, value in zip(samples, (True, False), strict=True):
        sample.columns["chosen"] = value
    return samples


def _texts_with_prompt(texts: Sequence[str], columns: Sequence[str]) -> list[Sample]:
    """Texts that begin with one prompt, up to white space."""
    start = _common(*texts)
    while start and not texts[0][start - 1].isspace():
        start -= 1
    start = len(texts[0][:start].rstrip())
    for name, text in zip(columns, texts, strict=True):
        if not text[start:].strip():
            raise BadRow("empty completion", f"{name} is all prompt: it ends where the other one goes on")
    return [Sample(text=text, start=start, ends=True) for text in texts]


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def turns_of(value: Any, name: str, role: str) -> list[Turn]:
    """Turns as they are, or one turn of a string."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return read_turns(value, name)
    return [{"role": role, "content": check_text(value, name)}]


def sample_of(turns: list[Turn], first: int, row: Mapping[str, Any], name: str) -> Sample:
    """A sample of turns, with the system prompt and the tools of the row.

    Args:
        turns: as ``read_turns`` returns them.
        first: the first turn that may be learned.
        row: the row.
        name: of the column that is learned, for messages.
    """
    if system := check_text(row.get("system") or "", "system"):
        if turns[0]["role"] != "system":
            turns, first = [{"role": "system", "content": system}, *turns], first + 1
        elif turns[0]["content"] != system:
            raise BadRow("two system prompts", f"system and the first turn of {name} are two system prompts: leave one")
    learned = [at for at in range(first, len(turns)) if turns[at]["role"] == "assistant"]
    if not learned:
        raise BadRow("no assistant turn", f"{name} has no assistant turn, so nothing to learn")
    learned = [at for at in learned if turns[at].get("weight", 1) != 0]
    if not learned:
        raise BadRow("no assistant turn", f"{name}: every assistant turn has weight 0, so nothing to learn")
    for at in learned:
        turn = turns[at]
        if not (turn["content"].strip() or turn.get("tool_calls") or turn.get("reasoning_content", "").strip()):
            where = f"turn {at + 1} of {name}" if len(turns) > 2 else name
            raise BadRow("empty completion", f"{where} is empty: nothing to learn")
    return Sample(turns[: learned[-1] + 1], tuple(learned), read_tools(row.get("tools")))
