"""Teachers that see more than the student: their predictions stand at the student's supervised tokens."""

import pytest
import torch
from cases import case
from tiny_models import MARKED, letters, llama, parameters
from torch.testing import assert_close

import qlens
from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE
from qlens.data.collator import collate

ROWS = [
    {"prompt": f"say {word}", "completion": word[::-1], "hint": f"it is {word[::-1]}"}
    for word in ("hello", "lamp", "tree", "x")
]
TEMPLATE = "{prompt} hint: {hint}"


def spying():
    """A loss that keeps its tokens."""

    def spy(tokens):
        if tokens.logits.grad_fn is not None:
            spy.tokens.append(tokens)
        return -tokens.label_log_probs + 0 * tokens.teacher.sum(-1)

    spy.tokens = []
    return qlens.registry.Method(name="spy", fn=spy, needs=("teacher",), scope="token").variant(), spy.tokens


def by_hand(teacher, prompts, examples):
    """The teacher's logits before every token of each answer, one text after the other."""
    rows = []
    for prompt, example in zip(prompts, examples, strict=True):
        answer = [
            token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORE
        ]
        ids = torch.tensor([[*prompt, *answer]])
        rows.append(teacher(input_ids=ids).logits[0, len(prompt) - 1 : -1].detach())
    return torch.cat(rows)


def test_the_teacher_predicts_the_same_tokens_after_its_own_prompt(make):
    tokenizer, teacher = letters(), llama(1, context=128)
    plain = qlens.encode(
        [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS], tokenizer
    ).examples
    longer = [{"prompt": f"{row['prompt']} hint: {row['hint']}", "completion": row["completion"]} for row in ROWS]
    encoded = qlens.encode(longer, tokenizer).examples
    prompts = [[i for i, y in zip(e["input_ids"], e["labels"], strict=True) if y == IGNORE] for e in encoded]
    expected = by_hand(teacher, prompts, plain)
    written = [{**row, "teacher_prompt": f"{row['prompt']} hint: {row['hint']}"} for row in ROWS]
    for name, rows, options in (("template", ROWS, dict(teacher_template=TEMPLATE)), ("column", written, {})):
        with case(name):
            variant, seen = spying()
            options |= dict(teacher=teacher, examples=rows, batch=4, processing_class=tokenizer)
            trainer = make(variant, model=llama(context=128), fused=False, **options)
            batch = trainer.data_collator(list(trainer.train_dataset))
            trainer.compute_loss(trainer.model, batch)
            assert_close(seen[-1].teacher, expected, rtol=1e-4, atol=1e-4)
            losses = []
            for fused in (True, False):
                trainer = make("kd", model=llama(context=128), fused=fused, **options)
                losses.append(trainer.compute_loss(trainer.model, batch))
            assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_conversations_show_the_template_in_their_user_turn(make):
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ],
            "hint": row["hint"],
        }
        for row in ROWS
    ]
    tokenizer = letters(MARKED)
    trainer = make(
        "kd", model=llama(context=128), teacher=qlens.CurrentModel(), examples=rows, processing_class=tokenizer,
        teacher_template=TEMPLATE + " {completion}",
    )  # fmt: skip
    shown = tokenizer.decode(trainer.train_dataset[0]["teacher_prompt_ids"])
    assert shown == "u:say hello hint: it is olleh olleh\na:"
    start = parameters(trainer.model)
    trainer.train()
    assert float((parameters(trainer.model) - start).norm()) > 1e-3  # a teacher that sees more teaches something


def test_sources_of_every_kind_see_more(make):
    ends = []
    for teacher in (qlens.CurrentModel(), qlens.EMA(0.0), llama(context=128), qlens.EMA(0.999999)):
        trainer = make(
            "kd", model=llama(context=128), teacher=teacher, examples=ROWS, processing_class=letters(), steps=3,
            teacher_template=TEMPLATE,
        )  # fmt: skip
        trainer.train()
        ends.append(parameters(trainer.model))
    assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6), assert_close(ends[3], ends[2], rtol=1e-3, atol=1e-5)
    assert float((ends[0] - ends[2]).norm()) > 1e-5


def test_left_padding_changes_nothing(make):
    trainer = make(
        "kd", model=llama(context=128), teacher=llama(1, context=128), examples=ROWS, processing_class=letters(),
        teacher_template=TEMPLATE,
    )  # fmt: skip
    batch = collate(list(trainer.train_dataset))
    shift = (1 - batch["attention_mask"]).sum(-1)
    left = {
        name: torch.stack([row.roll(int(s)) for row, s in zip(value, shift, strict=True)])
        for name, value in batch.items() if name != "teacher_prompt_ids"
    }  # fmt: skip
    left["teacher_prompt_ids"] = batch["teacher_prompt_ids"]
    assert_close(
        trainer.compute_loss(trainer.model, left), trainer.compute_loss(trainer.model, batch), rtol=1e-5, atol=1e-6
    )


def test_what_cannot_be_shown_is_refused(make):
    options = dict(teacher=llama(1, context=128), model=llama(context=128), processing_class=letters())
    with pytest.raises(InputError, match="field 'clue', which is no column of the data: completion, hint, prompt"):
        make("kd", examples=ROWS, teacher_template="{prompt} {clue}", **options)
    with pytest.raises(InputError, match="teacher_template must be text"):
        make("kd", examples=ROWS, teacher_template=3, **options)
    with pytest.raises(InputError, match="train_dataset: teacher_template .* cannot be read"):
        make("kd", examples=ROWS, teacher_template="{prompt", **options)
    with pytest.raises(InputError, match="train_dataset is encoded: give rows of text"):
        make("kd", examples=qlens.encode([{"text": "abc"}], letters()).examples, teacher_template=TEMPLATE, **options)
    with pytest.raises(InputError, match="supervised from its beginning"):
        make("kd", examples=[{"text": "abc", "teacher_prompt": "say"}], **options)
    with pytest.raises(InputError, match="must be text or turns in every row, got None"):
        make("kd", examples=[{**ROWS[0], "teacher_prompt": "a"}, {**ROWS[1], "teacher_prompt": None}], **options)
    packed = {
        "input_ids": [3, 4, 5, 6],
        "labels": [IGNORE, 4, IGNORE, 6],
        "seq_lengths": [2, 2],
        "teacher_prompt_ids": [4],
    }
    trainer = make("kd", examples=[packed], **options)
    with pytest.raises(InputError, match="teacher_prompt is one per row, and these rows hold several texts"):
        trainer.compute_loss(trainer.model, trainer.data_collator([packed]))
    empty = {"input_ids": [3, 4], "labels": [IGNORE, 4], "teacher_prompt_ids": []}
    with pytest.raises(InputError, match="teacher_prompt is empty in a row"):
        trainer.compute_loss(trainer.model, trainer.data_collator([empty]))
