"""Probes: what a chat template writes around and of an assistant's turn, asked once with made-up turns."""

import json
from typing import Any

from qlens.core.errors import InputError
from qlens.data.chat_templates import limits
from qlens.data.chat_templates.rendering import Renderer, Turns
from qlens.data.rows.bad_rows import BadRow

MARK = "qzjxk"
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}


class Probes:
    """What a chat template writes; without one, nothing but content. ``writes`` and ``adapted`` run it without a limit on time.

    Args:
        renderer: of the template, None for a tokenizer without.
        tokens: the special and added tokens of the tokenizer, as text.

    Attributes:
        prompt: the generation prompt, such as "<|im_start|>assistant\\n".
        no_thinking: what follows it where the template is asked for an answer without thinking, such as an empty think block.
        end: the token that the template writes right after an assistant's content, "" if none.
        parts: whether the template takes content as a list of parts alone.
        rewrites: whether an answer is written differently once the conversation goes on.
    """

    def __init__(self, renderer: Renderer | None, tokens: tuple[str, ...]):
        self.renderer = renderer
        self._writes: dict[str, bool] = {}
        self.parts = False
        try:
            with limits.time_limit(limits.SECONDS):
                self.parts = MARK not in self._text([USER, ANSWER])
                self.parts = self.parts and MARK in self._text([USER, ANSWER])
                before = self._text([USER])
                prompt = self._text([USER], prompt=True)
                without = self._text([USER], prompt=True, enable_thinking=False)
                answered = self._text([USER, ANSWER])
                longer = self._text([USER, ANSWER, USER, ANSWER])
        except limits.TimeUp:
            raise InputError(f"the chat template has not ended after {limits.SECONDS} seconds") from None
        self.prompt = prompt[len(before) :] if prompt.startswith(before) else ""
        self.no_thinking = without[len(prompt) :] if without.startswith(prompt) else ""
        self.rewrites = not longer.startswith(answered)
        after = answered.partition(MARK)[2]
        self.end = max((token for token in tokens if after.startswith(token)), key=len, default="")

    def writes(self, key: str) -> bool:
        """Whether the template writes ``reasoning_content``, ``tool_calls`` or ``tools``."""
        if key not in self._writes:
            function = {"name": MARK, "description": MARK, "parameters": {"type": "object", "properties": {}}}
            call = {"type": "function", "function": {"name": MARK, "arguments": {}}}
            turn = {"role": "assistant", "content": "b"}
            tools: Any = None
            if key == "tools":
                tools = [{"type": "function", "function": function}]
            else:
                turn |= {key: MARK} if key == "reasoning_content" else {"content": "", key: [call]}
            texts = [self._text([USER, turn], tools)]
            if key == "tool_calls":  # some templates take arguments as text alone
                call["function"]["arguments"] = "{}"
                texts.append(self._text([USER, turn]))
            self._writes[key] = any(MARK in text for text in texts)
        return self._writes[key]

    def adapted(self, turns: Turns) -> tuple[Turns, list[str]]:
        """Turns whose thinking and tool calls are content where the template would leave them out, and what was changed."""
        notes = []
        if any("reasoning_content" in turn for turn in turns) and not self.writes("reasoning_content"):
            notes.append(
                "thinking is written as <think> ... </think> before the content: the template does not write it"
            )
            turns = [_with_thinking(turn) for turn in turns]
        if any("tool_calls" in turn for turn in turns) and not self.writes("tool_calls"):
            notes.append("tool calls are written as <tool_call> ... </tool_call>: the template does not write them")
            turns = [_with_calls(turn) for turn in turns]
        return (_in_parts(turns) if self.parts else turns), notes

    def _text(self, turns: Turns, tools: Any = None, **options: Any) -> str:
        """What the template writes, "" where it refuses."""
        if self.renderer is None:
            return ""
        try:
            return self.renderer.text(_in_parts(turns) if self.parts else turns, tools, **options)
        except BadRow:
            return ""


def _in_parts(turns: Turns) -> Turns:
    """Turns whose content is a list of one text part, as templates of models with images want it."""
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def _with_thinking(turn: dict[str, Any]) -> dict[str, Any]:
    if "reasoning_content" not in turn:
        return turn
    turn = dict(turn)
    thinking = turn.pop("reasoning_content").strip("\n")
    return {**turn, "content": f"<think>\n{thinking}\n</think>\n\n{turn['content']}"}


def _with_calls(turn: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    turn = dict(turn)
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.pop("tool_calls")]
    lines = [*([turn["content"]] if turn["content"] else []), *(f"<tool_call>\n{c}\n</tool_call>" for c in calls)]
    return {**turn, "content": "\n".join(lines)}
