"""Teachers that see more than the student: a longer prompt before the same answer.

A row has a column ``teacher_prompt``, text or turns, which stands in the teacher's context for what precedes the row's first
supervised token; or ``teacher_template`` of the trainer writes it from the row's columns:

    teacher_template="{prompt}\\n\\nHint: {hint}"
    teacher_template="{prompt}\\n\\nAn example of a good answer: {completion}"

``{prompt}`` is the row's prompt, in a conversation its last user turn, and ``{completion}`` the answer that follows. In
batches it is ``teacher_prompt_ids``. The teacher's predictions are taken at the supervised tokens of its own row, one for
each of the student's.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError, brief
from qlens.core.supervised import IGNORE
from qlens.data.collator import TEACHER_PROMPT
from qlens.data.supervised_batch import SupervisedBatch
from qlens.engine.models.packing import is_packed

PROMPT = "teacher_prompt"
ANSWERS = ("completion", "answer", "solution", "output")


def privileged(batch: SupervisedBatch, features: Mapping[str, Any]) -> tuple[SupervisedBatch, dict[str, Any]] | None:
    """The batch as the teacher sees it, and its features; None where rows have no ``teacher_prompt_ids``.

    Args:
        batch: the student's.
        features: the models' inputs in it.

    Raises:
        InputError: rows are packed; a row has no prompt before its answer, or an empty one for the teacher.
    """
    if TEACHER_PROMPT not in batch.inputs:
        return None
    if is_packed(features):
        raise InputError(f"{PROMPT} is one per row, and these rows hold several texts: train without packing")
    ids, labels = batch.inputs["input_ids"], torch.full_like(batch.segment, IGNORE)
    labels[batch.index + 1] = batch.labels
    labels, mask = labels.view(batch.shape), batch.inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    rows = [_longer(*row) for row in zip(ids, labels, mask.bool(), batch.inputs[TEACHER_PROMPT], strict=True)]
    wide = max(len(tokens) for tokens, _ in rows)
    inputs = {
        name: torch.zeros(len(rows), wide, dtype=ids.dtype, device=ids.device) for name in ("input_ids", "labels")
    }
    inputs["labels"].fill_(IGNORE)
    inputs["attention_mask"] = torch.zeros_like(inputs["input_ids"])
    for number, (tokens, own_labels) in enumerate(rows):
        inputs["input_ids"][number, : len(tokens)], inputs["labels"][number, : len(tokens)] = tokens, own_labels
        inputs["attention_mask"][number, : len(tokens)] = 1
    return SupervisedBatch(inputs), {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _longer(ids: Tensor, labels: Tensor, mask: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """A row's tokens and labels with another prompt."""
    ids, labels, prompt = ids[mask], labels[mask], prompt[prompt >= 0]
    supervised = (labels != IGNORE).nonzero()[:, 0]
    first = int(supervised[0]) if len(supervised) else len(ids)
    if not len(prompt):
        raise InputError(f"{PROMPT} is empty in a row: give the teacher at least one token before the answer")
    before = torch.full_like(prompt, IGNORE)
    return torch.cat([prompt.to(ids), ids[first:]]), torch.cat([before.to(labels), labels[first:]])


def check_template(template: Any, keys: Sequence[str]) -> None:
    """Check that a template's fields are columns of the data.

    Raises:
        InputError: it is no text, or names another field.
    """
    if not isinstance(template, str):
        raise InputError(
            f"teacher_template must be text with fields like '{{prompt}} Hint: {{hint}}', got {brief(template)}"
        )
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise InputError(
            f"teacher_template {brief(template)} cannot be read: {error}; write {{{{ for a brace"
        ) from None
    known = {"prompt", "completion", *keys}
    if unknown := [field for field in fields if field not in known]:
        raise InputError(
            f"teacher_template has the field {brief(unknown[0])}, which is no column of the data: {', '.join(sorted(known))}"
        )


def teacher_prompt(row: Mapping[str, Any], template: str | None) -> Any:
    """The prompt that the teacher of a row sees, text or turns: its ``teacher_prompt``, or what the template writes.

    Raises:
        InputError: neither is there, or a field of the template is no text.
    """
    if template is None or row.get(PROMPT) is not None:
        return row.get(PROMPT)
    turns, prompt, answer = _parts(row)
    columns = {name: value for name, value in row.items() if isinstance(value, str | int | float)}
    try:
        text = template.format(**columns | {"prompt": prompt, "completion": answer})
    except (KeyError, IndexError) as error:
        raise InputError(f"teacher_template needs {error}, which a row has no text for") from None
    return text if turns is None else [*turns[:-1], {**turns[-1], "content": text}]


def _parts(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]] | None, str, str]:
    """The turns before a row's answer (None where its prompt is text), its prompt and its answer.

    Raises:
        InputError: the row has no prompt.
    """
    turns = row.get("messages") or row.get("prompt")
    if isinstance(turns, list):
        answer = row.get("completion") if "messages" not in row else turns
        first = next((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
        before = turns[:first]
        if not before or before[-1]["role"] != "user":
            raise InputError("teacher_template writes the user turn before the first answer, and a row has none there")
        after = next((turn["content"] for turn in answer or () if turn["role"] == "assistant"), "")
        return before, before[-1]["content"], after
    prompt = next((row[name] for name in ("prompt", "question", "problem", "instruction") if name in row), None)
    if not isinstance(prompt, str):
        raise InputError(
            f"teacher_template needs rows of prompt and completion or of messages, got {brief(sorted(row))}"
        )
    return None, prompt, next((row[name] for name in ANSWERS if isinstance(row.get(name), str)), "")


def with_teacher_prompt(
    row: Mapping[str, Any], example: Mapping[str, Any], template: str | None, encode: Callable[[Any], list[int]]
) -> dict[str, Any]:
    """``teacher_prompt_ids`` of a row.

    Args:
        row: with its text.
        example: its input_ids and labels.
        template: of the trainer; None where rows have a ``teacher_prompt``.
        encode: the tokens of a prompt, text or turns, up to where the answer begins.

    Raises:
        InputError: the row has no prompt of its own, or none for the teacher.
    """
    prompt, labels = teacher_prompt(row, template), example["labels"]
    if prompt is None or (not isinstance(prompt, str | list)):
        raise InputError(f"{PROMPT} must be text or turns in every row, got {brief(prompt)}")
    if len(labels) > 1 and labels[1] != IGNORE:
        raise InputError(
            f"{PROMPT} stands for the tokens before the answer, but a row is supervised from its beginning: give rows of prompt "
            "and completion, or set assistant_only_loss=True"
        )
    return {TEACHER_PROMPT: encode(prompt)}
