"""Turns of conversations, however they are written, as one form: role, content, reasoning_content, tool_calls."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlens.core.errors import brief
from qlens.data.rows.bad_rows import BadRow, check_text

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
"""The role of every name that a speaker has in data."""
SPEAKER, WORDS = ("role", "from"), ("content", "value")
THINKING = ("reasoning_content", "thinking", "reasoning")
FUNCTION_CALL = "function_call"

Turn = dict[str, Any]


def read_turns(value: Any, name: str) -> list[Turn]:
    """Turns as ``{"role", "content"}`` dicts, with ``reasoning_content``, ``tool_calls`` and further keys where they are there.

    Roles may be named as in ShareGPT (from/value, human, gpt, observation, function_call). Content that is a list of text
    parts is joined; content that is None beside tool calls or thinking is "". Tool calls are
    ``{"type": "function", "function": {"name", "arguments"}}``, arguments as an object where they are one.

    Args:
        value: a list of turns.
        name: of the column, for messages.

    Raises:
        BadRow: not a list of turns, an unknown role, or content that is no text.
    """
    if isinstance(value, Mapping) and all(isinstance(each, list) for each in value.values()):  # a table by columns
        value = [dict(zip(value, each, strict=False)) for each in zip(*value.values(), strict=False)]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise BadRow("wrong types", f"{name} must be a list of turns with role and content, got {brief(value, 60)}")
    return [_turn(turn, number, name) for number, turn in enumerate(value, 1)]


def _turn(turn: Any, number: int, name: str) -> Turn:
    where = f"{name}, turn {number}"
    if type(turn) is dict and len(turn) == 2 and type(turn.get("content")) is type(turn.get("role")) is str:
        if turn["role"] in _PLAIN:
            check_text(turn["content"], where)
            return turn
    if not isinstance(turn, Mapping):
        raise BadRow("wrong types", f"{where} must have role and content, got {brief(turn, 60)}")
    turn = {key: each for key, each in turn.items() if each is not None}
    speaker = next((turn.pop(key) for key in SPEAKER if key in turn), None)
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow("unknown role", f"{where} needs a role ({', '.join(ROLES)}) and content, got {brief(speaker, 60)}")
    content = _content(next((turn.pop(key) for key in WORDS if key in turn), None), where)
    calls = turn.pop("tool_calls", None) or turn.pop(FUNCTION_CALL, None)
    if speaker == FUNCTION_CALL and not calls:
        content, calls = None, _parsed(content, f"{where}: a function call")
    thinking = next((turn[key] for key in THINKING if turn.get(key)), None)
    turn = {key: each for key, each in turn.items() if key not in THINKING}
    read: Turn = {"role": role, "content": content or "", **turn}
    if thinking is not None:
        read["reasoning_content"] = check_text(thinking, f"{where}: {THINKING[0]}")
    if calls:
        read["tool_calls"] = _tool_calls(calls, where)
    if content is None and not calls and thinking is None:
        raise BadRow("no content", f"{where} of role {brief(speaker)} has no content")
    return read


_PLAIN = frozenset(role for role, same in ROLES.items() if role == same)


def _content(content: Any, where: str) -> str | None:
    """Text of a turn; of parts, those of type text one after the other."""
    if content is None or isinstance(content, str):
        return None if content is None else check_text(content, where)
    if not isinstance(content, Sequence):
        raise BadRow(
            "wrong types", f"{where} needs content that is a string or a list of parts, got {brief(content, 60)}"
        )
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or text is None:
            raise BadRow(
                "content that is no text",
                f"{where} has a part {brief(part, 60)}: only parts {{'type': 'text', 'text': ...}} are read",
            )
        texts.append(check_text(text, where))
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as templates expect them."""
    calls = _parsed(calls, f"{where}: tool_calls") if isinstance(calls, str) else calls
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, Sequence):
        raise BadRow("wrong types", f"{where}: tool_calls must be a list, got {brief(calls, 60)}")
    read = []
    for call in calls:
        call = _parsed(call, f"{where}: a tool call") if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow("wrong types", f"{where}: a tool call needs a name and arguments, got {brief(call, 60)}")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
            except (ValueError, RecursionError):  # text that is no object: as it stands
                check_text(arguments, f"{where}: arguments")
        own = {key: each for key, each in call.items() if key not in ("function", "name", "arguments", "parameters")}
        read.append({"type": "function", **own, "function": {"name": function["name"], "arguments": arguments}})
    return read


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a row as JSON schemas, from a list or JSON text; None where there are none.

    Raises:
        BadRow: something else.
    """
    tools = _parsed(value, "tools") if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("wrong types", f"tools must be a list of JSON schemas, got {brief(value, 60)}")
    return [dict(tool) for tool in tools]


def _parsed(value: Any, name: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise BadRow("wrong types", f"{name} must be JSON, got {brief(value, 60)}") from None
