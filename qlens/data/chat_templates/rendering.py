"""Rendering: chat templates run on conversations, with a limit on time and length."""

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlens.core.errors import InputError
from qlens.data.chat_templates import limits
from qlens.data.rows.bad_rows import BadRow, check_text

Turns = list[dict[str, Any]]
Spans = list[tuple[int, int]]


class Renderer:
    """A tokenizer's chat templates, or another one in their place.

    Args:
        tokenizer: whose templates and special tokens are used.
        template: instead of the tokenizer's.

    Raises:
        InputError: a template that is none, or cannot be interrupted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None):
        own = tokenizer.chat_template if template is None else template
        self.templates = dict(own) if isinstance(own, dict) else {"default": own}
        self.tokens = dict(tokenizer.special_tokens_map)
        for each in self.templates.values():
            limits.check_template(each)

    def template(self, tools: Any = None) -> str:
        """The template that is used, with or without tools."""
        if tools is not None and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" not in self.templates:
            raise InputError(
                f"the tokenizer has chat templates {', '.join(map(repr, self.templates))} but no default: set "
                "tokenizer.chat_template to one"
            )
        return self.templates["default"]

    def marked(self, turns: Turns, tools: Any) -> tuple[str, Spans]:
        """The text of a conversation, and the spans of it inside generation marks."""
        return self._run(turns, tools, return_assistant_tokens_mask=True)

    def text(self, turns: Turns, tools: Any, prompt: bool = False, **options: Any) -> str:
        """The text of a conversation; ``prompt``: with the generation prompt after it."""
        return self._run(turns, tools, add_generation_prompt=prompt, **options)[0]

    def _run(self, turns: Turns, tools: Any, **options: Any) -> tuple[str, Spans]:
        """What the template writes.

        Raises:
            BadRow: the template fails, refuses the turns, or writes no valid text.
        """
        try:
            texts, spans = render_jinja_template(
                conversations=[turns], tools=tools, chat_template=self.template(tools), **self.tokens, **options
            )
        except TemplateError as error:
            raise BadRow("refused by the chat template", f"the chat template refuses these turns: {error}") from error
        except limits.FAULTS as error:
            if isinstance(error, InputError):
                raise
            message = f"{type(error).__name__}: {error}"
            raise BadRow(
                "refused by the chat template", f"the chat template fails on these turns: {message}"
            ) from error
        (text,) = texts
        if len(text) > limits.CHARACTERS:
            raise BadRow(
                "refused by the chat template",
                f"the chat template writes {len(text)} characters: at most {limits.CHARACTERS} are read",
            )
        return check_text(text, "what the chat template writes"), spans[0] if spans else []


def limited(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """The results of a function that runs chat templates, or the BadRow that it raised, for every item.

    The limit is one of all items together as long as they are quick, and then of one at a time: a timer for each would take
    longer than most templates.
    """
    results: list[Any] = []
    alone = False
    while len(results) < len(items):
        try:
            with limits.time_limit(limits.SECONDS):
                while len(results) < len(items):
                    try:
                        result = function(items[len(results)])
                    except BadRow as error:
                        result = error
                    results.append(result)
                    if alone:
                        break
            alone = False
        except limits.TimeUp:
            if alone:
                late = f"the chat template has not ended after {limits.SECONDS} seconds"
                results.append(BadRow("refused by the chat template", late))
            alone = not alone
    return results
