"""Chat templates: what they write for a conversation, and which part of it the assistant writes.

Read ``learned_text`` (the three ways to find it), ``probes`` (what a template writes, asked once), ``rendering`` (templates run)
and ``limits`` (in bounded time and length).
"""

from qlens.data.chat_templates.learned_text import ChatTemplate, LearnedText

__all__ = ["ChatTemplate", "LearnedText"]
