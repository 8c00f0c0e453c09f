"""Samples as text for tokenizers without a chat template."""

from qlens.data.chat_templates import LearnedText
from qlens.data.chat_templates.probes import Probes
from qlens.data.rows.samples import Sample

JOINED, WHOLE = "no chat template: turns one after the other", "text as it is"
_NO_TEMPLATE = Probes(None, ())


def joined(sample: Sample) -> list[LearnedText]:
    """``turn \\n`` for other roles and ``turn EOS`` for the assistant, without role names, as one text per assistant turn."""
    turns, notes = _NO_TEMPLATE.adapted(sample.turns)
    if sample.tools:
        notes.append("tools are left out: there is no chat template to write them")
    texts, before = list[LearnedText](), ""
    for at, turn in enumerate(turns):
        if turn["role"] != "assistant":
            before += turn["content"] + "\n"
            continue
        text = before + turn["content"]
        spans = [(len(before), len(text))] if at in sample.learned else []
        texts.append(LearnedText(text, spans, begins=not texts, ends=True, way=JOINED, notes=notes))
        before = ""
    return texts


def whole(sample: Sample) -> list[LearnedText]:
    """A text, learned from its start on, whatever the chat template."""
    return [LearnedText(sample.text, [(sample.start, len(sample.text))], begins=True, ends=sample.ends, way=WHOLE)]
