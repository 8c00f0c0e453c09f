"""What is learned under templates of the common families: the assistant's turns with their end tokens, and nothing else."""

import pytest
from cases import case
from small_tokenizers import FAMILIES, LOOP, THINKING, family, learned, small_tokenizer, spelled

from qlens.core.errors import InputError
from qlens.data import encode
from qlens.data.chat_templates.learned_text import MARKS, PREFIXES, TRAINING
from qlens.data.chat_templates.training_templates import _families

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}
AGAIN, LAST = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "\n Yes, é!"}
CHATML = ["<|im_start|>", "<|im_end|>"]
MARKED = (
    LOOP
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def of(tokenizer, *turns, **columns) -> list[str]:
    """What is learned of a conversation."""
    return learned(tokenizer, encode([{"messages": list(turns), **columns}], tokenizer).examples[0])


def test_every_family_in_one_turn_and_in_two():
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot|>", "gemma": "</turn>", "mistral": "</s>", "phi": "<|end|>"}
    for name, end in ends.items():
        with case(name):
            tokenizer = family(name)
            space = " " if name == "mistral" else ""
            last = LAST["content"].strip() if name in ("llama3", "gemma") else LAST["content"]
            assert of(tokenizer, USER, ANSWER, AGAIN) == [f"{space}It is 4.{end}"]
            if name == "phi":  # its end of the conversation is nowhere else, so that beginnings are not told apart
                with pytest.raises(InputError, match="before turn 2 differently"):
                    of(tokenizer, USER, ANSWER, AGAIN, LAST)
                continue
            assert of(tokenizer, USER, ANSWER, AGAIN, LAST) == [f"{space}It is 4.{end}", f"{space}{last}{end}"]


def test_the_tokens_are_those_of_the_template_and_a_prompts_those_at_inference():
    for name in FAMILIES:
        with case(name):
            tokenizer = family(name)
            turns = [USER, ANSWER] if name == "phi" else [USER, ANSWER, AGAIN, LAST]
            example = encode([{"messages": turns}], tokenizer).examples[0]
            assert example["input_ids"] == tokenizer.apply_chat_template(turns, return_dict=False)
            for at in range(1, len(turns), 2):
                prompt = tokenizer.apply_chat_template(turns[:at], add_generation_prompt=True, return_dict=False)
                assert example["input_ids"][: len(prompt)] == prompt
                assert example["labels"][len(prompt)] != -100 and example["labels"][len(prompt) - 1] == -100


def test_a_template_that_refuses_a_turn_is_named():
    with pytest.raises(InputError, match="row 1: the chat template refuses these turns: no system turn"):
        of(family("gemma"), {"role": "system", "content": "be brief"}, USER, ANSWER)


def test_the_same_is_learned_by_marks_and_by_prefixes():
    narrow = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    wide = MARKED.replace("<|im_start|>{{ m.role }}\n{% if", "{% if").replace(
        "{% generation %}", "{% generation %}<|im_start|>assistant\n"
    ).replace("{% else %}", "{% else %}<|im_start|>{{ m.role }}\n")  # fmt: skip
    turns = [USER, ANSWER, AGAIN, LAST]
    prefixes = encode([{"messages": turns}], family("chatml"))
    assert dict(prefixes.report.ways) == {PREFIXES: 1}
    for template in (MARKED, narrow, wide, MARKED.replace("{% endgeneration %}", "{{ '\\n' }}{% endgeneration %}").replace(
        "{% endif %}{{ '\\n' }}{% endfor", "{% endif %}{{ '\\n' if m.role != 'assistant' }}{% endfor"
    )):  # fmt: skip
        with case(template):
            marks = encode([{"messages": turns}], family("chatml", template=template))
            assert dict(marks.report.ways) == {MARKS: 1}
            assert marks == prefixes


def test_marks_of_some_turns_only_are_not_trusted():
    some = MARKED.replace("m.role == 'assistant' %}", "m.role == 'assistant' and loop.last %}")
    encoded = encode([{"messages": [USER, ANSWER, AGAIN, LAST]}], family("chatml", template=some))
    assert encoded.report.ways == {PREFIXES: 1}
    assert learned(family("chatml"), encoded.examples[0]) == ["It is 4.<|im_end|>", "\n Yes, é!<|im_end|>"]


def test_thinking_is_learned_where_the_row_has_it_and_an_empty_block_is_not():
    tokenizer = small_tokenizer(THINKING, CHATML, eos_token="<|im_end|>")
    thought = {**ANSWER, "reasoning_content": "two and two"}
    assert of(tokenizer, USER, ANSWER) == ["It is 4.<|im_end|>"]
    assert of(tokenizer, USER, thought) == ["<think>\ntwo and two\n</think>\n\nIt is 4.<|im_end|>"]
    assert of(tokenizer, USER, {**ANSWER, "thinking": "two and two"}) == of(tokenizer, USER, thought)
    assert of(tokenizer, USER, thought, AGAIN, thought) == 2 * of(tokenizer, USER, thought)
    always = small_tokenizer(THINKING.replace("enable_thinking", "never"), CHATML, eos_token="<|im_end|>")
    assert of(always, USER, ANSWER) == ["<think>\n\n</think>\n\nIt is 4.<|im_end|>"]  # the model has to write it


def test_a_prompt_that_opens_a_think_block_wants_thinking():
    template = (
        LOOP
        + "<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = small_tokenizer(template, CHATML, eos_token="<|im_end|>")
    assert of(tokenizer, USER, {**ANSWER, "reasoning_content": "sum"}) == ["sum</think>It is 4.<|im_end|>"]
    with pytest.raises(InputError, match="turn 2 has no thinking, .* give the turn reasoning_content"):
        of(tokenizer, USER, ANSWER)


def test_what_a_template_leaves_out_is_written_and_noted():
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}],
    }
    row = {"messages": [USER, {**ANSWER, "reasoning_content": "sum"}, AGAIN, call], "tools": [{"name": "add"}]}
    encoded = encode([row], family("chatml"))
    assert learned(family("chatml"), encoded.examples[0]) == [
        "<think>\nsum\n</think>\n\nIt is 4.<|im_end|>",
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
    ]
    assert encoded.report.count("noted") == 3 and "tools are left out" in str(encoded.report)


def test_tools_and_calls_go_to_a_template_that_writes_them():
    template = FAMILIES["chatml"][0].replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function | tojson }}]{% endfor %}"
    )
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + template
    tokenizer = small_tokenizer(template, FAMILIES["chatml"][1], eos_token="<|endoftext|>")
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}
    encoded = encode([{"messages": [USER, call], "tools": '[{"name": "add"}]'}], tokenizer)
    assert learned(tokenizer, encoded.examples[0]) == ['[{"name": "add", "arguments": {"a": 2}}]<|im_end|>']
    assert spelled(tokenizer, encoded.examples[0]["input_ids"]).startswith('[{"name": "add"}]')
    assert not encoded.report.count("noted")


def test_a_conversation_may_begin_with_the_assistant():
    assert of(family("chatml"), ANSWER, USER, LAST) == ["It is 4.<|im_end|>", "\n Yes, é!<|im_end|>"]


def test_a_template_without_an_end_token_is_noted():
    tokenizer = small_tokenizer(LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}", ["</s>"], eos_token="</s>")
    encoded = encode([{"messages": [USER, ANSWER]}], tokenizer)
    assert learned(tokenizer, encoded.examples[0]) == ["assistant: It is 4.\n"]
    assert "no end token is learned" in str(encoded.report)


def test_templates_in_several_versions_and_with_named_variants():
    default, tools = FAMILIES["chatml"][0], "{{ tools | tojson }}" + FAMILIES["chatml"][0]
    tokenizer = small_tokenizer(
        {"default": default, "tool_use": tools}, FAMILIES["chatml"][1], eos_token="<|endoftext|>"
    )
    examples = encode(
        [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], "tools": [{"name": "f"}]}], tokenizer
    ).examples
    assert [spelled(tokenizer, each["input_ids"])[:12] for each in examples] == ["<|im_start|>", '[{"name": "f']
    assert learned(tokenizer, examples[0]) == learned(tokenizer, examples[1])


def test_trls_templates_of_many_families_learn_the_same_by_prefixes_and_by_marks():
    """The original and the training template of every family whose tokens are spelled out in its template."""
    pairs = {original.name: (original, training) for original, training in _families()}
    names = {
        "qwen2_5.jinja",
        "qwen3.jinja",
        "gemma3.jinja",
        "phi3.jinja",
        "gptoss.jinja",
        "glm4moe.jinja",
        "lfm2.jinja",
    }
    names &= set(pairs)
    assert names, "TRL has no training templates where they are looked for"
    added = ["<|im_start|>", "<|im_end|>", "<end_of_turn>", "<start_of_turn>", "<|user|>", "<|assistant|>", "<|end|>"]
    added += ["<|start|>", "<|message|>", "<|channel|>", "<|return|>", "[gMASK]", "<sop>", "<|endoftext|>", "<bos>"]
    for name in sorted(names):
        own, marked = (
            small_tokenizer(path.read_text(), added, eos_token="<|endoftext|>", bos_token="<bos>")
            for path in pairs[name]
        )
        for turns in ([USER, ANSWER], [USER, ANSWER, AGAIN, LAST]):
            with case(name, len(turns)):
                encoded, by_marks = encode([{"messages": turns}], own), encode([{"messages": turns}], marked)
                assert learned(own, encoded.examples[0]) == learned(marked, by_marks.examples[0])
                assert list(by_marks.report.ways) == [MARKS] and list(encoded.report.ways)[0] in (PREFIXES, TRAINING)
