"""The text of a conversation, and the parts of it that the assistant writes.

What is learned is what the model has to write at inference: it begins where the generation prompt ends and ends with the
turn's end token. An empty think block that the template writes for an answer without thinking is part of the prompt of such
an answer, where the template says so (``enable_thinking``), and is not learned; thinking of the row is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlens.data.chat_templates.probes import Probes
from qlens.data.chat_templates.rendering import Renderer, Spans, Turns, limited
from qlens.data.chat_templates.training_templates import training_template
from qlens.data.rows.bad_rows import BadRow
from qlens.data.rows.samples import Sample

REWRITTEN = "rewritten by the chat template"
MARKS, TRAINING, PREFIXES = "generation marks", "TRL's training template", "prefixes"
"""Ways to find what is learned."""
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(slots=True)
class LearnedText:
    """A text of which some spans are learned.

    Args:
        text: what a template writes, or the data alone.
        spans: of characters, [start, end), in order.
        begins, ends: whether the tokenizer's BOS comes before it, and its EOS after it, learned.
        way: how the spans were found.
        notes: what of the row is written otherwise.
    """

    text: str
    spans: Spans
    begins: bool = False
    ends: bool = False
    way: str = ""
    notes: list[str] = field(default_factory=list)


class ChatTemplate:
    """A tokenizer's chat template.

    Generation marks show what is learned where the template has them; else the beginnings of a conversation do, each written
    by itself; where the template writes them differently later, TRL's training template of the family does, with marks. Of one
    conversation the same is learned however many others there are.

    Args:
        tokenizer: with a chat template.

    Raises:
        InputError: a template that is none, or cannot be interrupted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.renderer = Renderer(tokenizer)
        self.tokenizer: Any = tokenizer
        self.tokens = tuple(
            token for token in {*self.tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens} if token
        )
        self._eos = str(tokenizer.eos_token or "")
        self.probes = Probes(self.renderer, self.tokens)
        self._training: Renderer | None = None
        self._asked = False  # whether TRL was asked for a training template

    def texts(self, samples: Sequence[Sample]) -> list[LearnedText | BadRow]:
        """The text of every conversation with what is learned of it, or why there is none."""
        if not self._asked and any(map(self._needs_training, samples)):
            self._ask()
        texts = limited(self.learned, samples)
        rewritten = [at for at, text in enumerate(texts) if isinstance(text, BadRow) and text.reason == REWRITTEN]
        if rewritten and not self._asked:
            self._ask()
            for at, text in zip(rewritten, limited(self.learned, [samples[at] for at in rewritten]), strict=True):
                texts[at] = text
        return texts

    def _needs_training(self, sample: Sample) -> bool:
        """Whether the template writes no end token, or the sample's turns differently once the conversation goes on."""
        return not self.probes.end or self.probes.rewrites and len(sample.learned) > 1

    def _ask(self) -> None:
        self._asked, self._training = True, training_template(self.tokenizer, self.renderer)

    def learned(self, sample: Sample) -> LearnedText:
        """The text of a conversation with what is learned of it; runs without a limit on time.

        Raises:
            BadRow: the template refuses it, or what is learned cannot be told apart.
        """
        turns, notes = self.probes.adapted(sample.turns)
        if sample.tools and not self.probes.writes("tools"):
            notes.append("tools are left out: the template does not write them")
        text = (
            self._marked(self.renderer, turns, sample) if _MARK.search(self.renderer.template(sample.tools)) else None
        )
        way = MARKS
        if text is None and self._training is not None and self._needs_training(sample):
            text, way = self._marked(self._training, turns, sample), TRAINING
        if text is None:
            text, way = self._by_prefixes(turns, sample)
        if "strftime_now" in self.renderer.template(sample.tools):
            notes.append("the chat template writes today's date: the tokens of another day differ")
        text.way, text.notes = way, notes
        return text

    def _marked(self, renderer: Renderer, turns: Turns, sample: Sample) -> LearnedText | None:
        """By generation marks; None where they are not one for every assistant turn."""
        text, spans = renderer.marked(turns, sample.tools)
        spans = [span for span in spans if self._without_tokens(text[slice(*span)])]
        assistant = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
        if len(spans) != len(assistant):
            if len(spans) < len(assistant) or len(assistant) != len(sample.learned):
                return None
        else:
            spans = [span for at, span in zip(assistant, spans, strict=True) if at in sample.learned]
        return LearnedText(text, [self._own(text, *self._unprompted(text, *span)) for span in spans])

    def _by_prefixes(self, turns: Turns, sample: Sample) -> tuple[LearnedText, str]:
        """By what the template writes up to a turn and after it; where it rewrites that later, by a training template."""
        tools, spans = sample.tools, []
        text = self.renderer.text(turns, tools)
        for at in sample.learned:
            whole = text if at == len(turns) - 1 else self.renderer.text(turns[: at + 1], tools)
            prompt = self._prompt(turns[:at], tools, whole)
            if not (whole.startswith(prompt) and text.startswith(whole)):
                learned = None if self._training is None else self._marked(self._training, turns, sample)
                if learned is None:
                    raise BadRow(REWRITTEN, self._rewritten(prompt, whole, at))
                return learned, TRAINING
            spans.append(self._own(text, len(prompt), len(whole)))
        return LearnedText(text, spans), PREFIXES

    def _prompt(self, turns: Turns, tools: Any, whole: str) -> str:
        """What the template writes up to the generation prompt, also where nobody spoke before the assistant."""
        if turns:
            return self.renderer.text(turns, tools, prompt=True)
        start = whole.find(self.probes.prompt)
        return whole[: start + len(self.probes.prompt)] if start >= 0 else ""

    def _rewritten(self, prompt: str, whole: str, at: int) -> str:
        if (
            "think" in self.probes.prompt
            and not whole.startswith(prompt)
            and whole.startswith(prompt[: -len("<think>\n")])
        ):
            return (
                f"turn {at + 1} has no thinking, but the chat template's prompt for it opens a think block: give the turn "
                "reasoning_content"
            )
        return (
            f"the chat template writes what comes before turn {at + 1} differently once that turn is there, so that the "
            "tokens of its turns cannot be separated: set tokenizer.chat_template to one with {% generation %} marks"
        )

    def _unprompted(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A marked span without what the generation prompt writes of it, and with the end token right behind it."""
        prompt = self.probes.prompt
        for cut in range(len(prompt), -1, -1):
            if text.startswith(prompt[cut:], start) and text.endswith(prompt[:cut], 0, start):
                start += len(prompt) - cut
                break
        if not text[start:end].rstrip().endswith(self.tokens):
            for token in (self.probes.end, self._eos):
                if token and text.startswith(token, end):
                    return start, end + len(token)
        return start, end

    def _own(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A span without an empty think block before it and without what follows its end token."""
        if self.probes.no_thinking and text.startswith(self.probes.no_thinking, start, end):
            start += len(self.probes.no_thinking)
        turn, eos, own = text[start:end], self._eos, self.probes.end
        if own and (at := turn.rfind(own)) >= 0 and not self._without_tokens(turn[at + len(own) :]):
            return start, start + at + len(own)
        if (stripped := turn.rstrip()).endswith(self.tokens):
            return start, start + len(stripped)
        if eos and eos in turn:
            return start, start + turn.rindex(eos) + len(eos)
        return start, end

    def _without_tokens(self, text: str) -> str:
        """A text without the white space and the added tokens that it begins with."""
        text = text.lstrip()
        while text.startswith(self.tokens):
            text = text[max(len(token) for token in self.tokens if text.startswith(token)) :].lstrip()
        return text
