"""What is learned with real tokenizers: Qwen3 (thinking, tools, several turns), SmolLM2, and a tiny model without a template."""

from pathlib import Path

import pytest
from real_model import smollm2
from small_tokenizers import learned, spelled

from qlens.data import encode
from qlens.data.chat_templates.learned_text import PREFIXES, TRAINING
from qlens.data.models import load_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
USER, ANSWER = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}
AGAIN, LAST = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "\nYes.\n"}
THOUGHT = {**ANSWER, "reasoning_content": "two and two"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a sum", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a":2}'}}]}
TOOL_TURNS = [USER, CALL, {"role": "tool", "content": "4"}, ANSWER]
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'


def of(tokenizer, turns, **columns):
    """What is learned of a conversation, its text and its report."""
    encoded = encode([{"messages": turns, **columns}], tokenizer)
    example = encoded.examples[0]
    return learned(tokenizer, example), spelled(tokenizer, example["input_ids"]), encoded.report


@pytest.fixture(scope="module")
def qwen3():
    """Qwen3's tokenizer."""
    if not (SHARED / "tokenizers/qwen3").is_dir():
        pytest.skip("the real data is not there (shared/data beside the repository)")
    return load_tokenizer(SHARED / "tokenizers/qwen3")


def test_qwen3_in_one_turn(qwen3):
    empty, end = "<think>\n\n</think>\n\n", "<|im_end|>"
    texts, text, report = of(qwen3, [USER, ANSWER])
    assert texts == [f"It is 4.{end}"] and list(report.ways) == [PREFIXES]
    assert text == f"<|im_start|>user\nWhat is 2+2?{end}\n<|im_start|>assistant\n{empty}It is 4.{end}\n"
    assert text == qwen3.apply_chat_template([USER, ANSWER], tokenize=False)
    assert of(qwen3, [USER, THOUGHT])[0] == [f"<think>\ntwo and two\n</think>\n\nIt is 4.{end}"]
    inside = {**ANSWER, "content": "<think>\ntwo and two\n</think>\n\nIt is 4."}
    assert of(qwen3, [USER, inside])[0] == of(qwen3, [USER, THOUGHT])[0]
    assert of(qwen3, [USER, {**ANSWER, "content": f"{empty}It is 4."}])[0] == texts


def test_qwen3_in_two_turns_and_with_tools(qwen3):
    texts, text, report = of(qwen3, [USER, ANSWER, AGAIN, LAST])
    assert texts == ["It is 4.<|im_end|>", "Yes.\n<|im_end|>"] and list(report.ways) == [TRAINING]
    assert text.count("<think>\n\n</think>\n\n") == 2
    texts, text, report = of(qwen3, [USER, THOUGHT, AGAIN, THOUGHT])
    assert texts == ["<think>\ntwo and two\n</think>\n\nIt is 4.<|im_end|>"] * 2
    _, text, _ = of(load_tokenizer(SHARED / "tokenizers/qwen3"), [ANSWER, USER, LAST])
    assert text.count("<think>") == 2  # as it is after other rows
    texts, text, report = of(qwen3, TOOL_TURNS, tools=TOOLS)
    assert texts == [f"{CALLED}<|im_end|>", "It is 4.<|im_end|>"] and not report.count("noted")
    assert '{"name": "add", "description": "a sum"' in text and "<tool_response>\n4\n</tool_response>" in text
    only_last = encode([{"prompt": [USER, ANSWER, AGAIN], "completion": [LAST]}], qwen3)
    assert learned(qwen3, only_last.examples[0]) == ["Yes.\n<|im_end|>"]
    assert spelled(qwen3, only_last.examples[0]["input_ids"]) == qwen3.apply_chat_template(
        [USER, ANSWER, AGAIN, LAST], tokenize=False
    )


def test_qwen3_learns_the_same_by_trls_template_and_by_its_own(qwen3):
    """A row in one turn is written alike; TRL's template alone is read by its marks."""
    from qlens.data.chat_templates import ChatTemplate
    from qlens.data.chat_templates.training_templates import training_template

    template = training_template(qwen3, ChatTemplate(qwen3).renderer).template()
    marked = load_tokenizer(SHARED / "tokenizers/qwen3")
    marked.chat_template = template
    for turns in ([USER, ANSWER], [USER, THOUGHT], [{"role": "system", "content": "Be brief."}, USER, LAST]):
        assert encode([{"messages": turns}], marked) == encode([{"messages": turns}], qwen3)
    for turns in ([USER, ANSWER, AGAIN, LAST], TOOL_TURNS):
        assert encode([{"messages": turns}], marked) == encode([{"messages": turns}], qwen3)


def test_a_tiny_model_without_a_template():
    if not SHARED.is_dir():
        pytest.skip("the real data is not there (shared/data beside the repository)")
    tokenizer = load_tokenizer(SHARED / "models/stories260k")
    assert of(tokenizer, [USER, ANSWER])[:2] == (["It is 4.</s>"], "<s> What is 2+2?\nIt is 4.</s>")
    assert of(tokenizer, [USER, ANSWER, AGAIN, LAST])[0] == ["It is 4.</s>", "\nYes.\n</s>"]
    texts, _, report = of(tokenizer, [USER, THOUGHT])
    assert texts == ["<think>\ntwo and two\n</think>\n\nIt is 4.</s>"] and report.count("noted") == 1
    assert of(tokenizer, TOOL_TURNS, tools=TOOLS)[0] == [f"{CALLED}</s>", "It is 4.</s>"]


@pytest.mark.real
def test_smollm2():
    tokenizer, end = load_tokenizer(smollm2()), "<|im_end|>"
    texts, text, report = of(tokenizer, [USER, ANSWER, AGAIN, LAST])
    assert texts == [f"It is 4.{end}", f"\nYes.\n{end}"] and list(report.ways) == [PREFIXES]
    assert text == tokenizer.apply_chat_template([USER, ANSWER, AGAIN, LAST], tokenize=False)
    example = encode([{"messages": [USER, ANSWER, AGAIN, LAST]}], tokenizer).examples[0]
    prompt = tokenizer.apply_chat_template([USER, ANSWER, AGAIN], add_generation_prompt=True, return_dict=False)
    assert example["input_ids"][: len(prompt)] == prompt  # although "\n" and "\nYes" would share a token
    assert of(tokenizer, [USER, THOUGHT])[0] == [f"<think>\ntwo and two\n</think>\n\nIt is 4.{end}"]
    assert of(tokenizer, TOOL_TURNS, tools=TOOLS)[0] == [f"{CALLED}{end}", f"It is 4.{end}"]
