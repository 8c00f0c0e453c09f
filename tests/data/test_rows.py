"""Shapes of rows: the same conversation in every one of them, and rows that have none."""

import json

import pytest
from cases import case
from small_tokenizers import family, learned, spelled

from qlens.core.errors import InputError
from qlens.data import encode, load_rows
from qlens.data.rows import ignored_keys

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}
SYSTEM = {"role": "system", "content": "Be brief."}
PARTS = {"role": "assistant", "content": [{"type": "text", "text": "It is"}, {"type": "text", "text": " 4."}]}

ONE_TURN = {
    "prompt and completion": {"prompt": "2+2?", "completion": "It is 4."},
    "as turns": {"prompt": [USER], "completion": [ANSWER]},
    "of both kinds": {"prompt": [USER], "completion": "It is 4."},
    "question and answer": {"question": "2+2?", "answer": "It is 4."},
    "messages": {"messages": [USER, ANSWER]},
    "parts of text": {"messages": [USER, PARTS]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "It is 4."}]},
    "Alpaca": {"instruction": "2+2?", "input": "", "output": "It is 4."},
    "problem and solution": {"problem": "2+2?", "solution": "It is 4."},
    "NuminaMath": {"source": "x", "problem": "no", "solution": "no", "messages": [USER, ANSWER]},
    "keys of other rows": {"prompt": "2+2?", "completion": "It is 4.", "messages": None, "weight": None},
    "a table of turns": {"conversations": {"from": ["human", "gpt"], "value": ["2+2?", "It is 4."]}},
}  # fmt: skip
WITH_SYSTEM = [
    {"messages": [SYSTEM, USER, ANSWER]},
    {"system": "Be brief.", "prompt": "2+2?", "completion": "It is 4."},
    {"system": "Be brief.", "conversations": ONE_TURN["ShareGPT"]["conversations"]},
    {"system": "Be brief.", "instruction": "2+2?", "input": "", "output": "It is 4."},
    {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
]
CALL = {"name": "add", "arguments": {"a": 2}}
WITH_CALL = [
    {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
                  {"role": "tool", "content": "4"}, ANSWER]},
    {"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "arguments": '{"a": 2}'}]},
                  {"role": "tool", "content": "4"}, ANSWER]},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "function_call", "value": json.dumps(CALL)},
                       {"from": "observation", "value": "4"}, {"from": "gpt", "value": "It is 4."}]},
]  # fmt: skip


def test_the_same_data_in_every_shape_gives_the_same_examples():
    for name in ("chatml", "llama3", "mistral", "phi"):
        tokenizer = family(name)
        expected = encode([ONE_TURN["messages"]], tokenizer)
        for shape, row in ONE_TURN.items():
            with case(name, shape):
                assert encode([row], tokenizer) == expected
        for rows in (WITH_SYSTEM, WITH_CALL if name != "phi" else WITH_SYSTEM):
            for row in rows:
                with case(name, row):
                    assert encode([row], tokenizer) == encode(rows[:1], tokenizer)
    plain = family("mistral", template=None)
    for row in ONE_TURN.values():
        assert encode([row], plain) == encode([("2+2?", "It is 4.")], plain)


def test_an_input_and_a_history_of_alpaca():
    row = {"instruction": "Add.", "input": "2+2", "output": "4", "history": [["Hi", "Hello"]], "system": "Be brief."}
    tokenizer = family("chatml")
    turns = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
             {"role": "user", "content": "Add.\n2+2"}, {"role": "assistant", "content": "4"}]  # fmt: skip
    assert encode([row], tokenizer) == encode([{"messages": turns}], tokenizer)


def test_an_assistant_turn_of_the_prompt_or_of_weight_0_is_not_learned():
    tokenizer, again = family("chatml"), {"role": "assistant", "content": "Yes."}
    turns = [USER, ANSWER, {"role": "user", "content": "Sure?"}, again]
    rows = [
        {"prompt": turns[:3], "completion": turns[3:]},
        {"messages": [USER, {**ANSWER, "weight": 0}, *turns[2:]]},
    ]
    for row in rows:
        example = encode([row], tokenizer).examples[0]
        assert learned(tokenizer, example) == ["Yes.<|im_end|>"]
        assert example["input_ids"] == encode([{"messages": turns}], tokenizer).examples[0]["input_ids"]


def test_pairs_are_two_examples():
    tokenizer = family("chatml")
    better, worse = [{"role": "assistant", "content": text} for text in ("4.", "5.")]
    rows = [
        {"prompt": "2+2?", "chosen": "4.", "rejected": "5."},
        {"prompt": [USER], "chosen": [better], "rejected": [worse]},
        {"chosen": [USER, better], "rejected": [USER, worse]},
        {"prompt": "2+2?", "chosen": [USER, better], "rejected": [USER, worse]},
    ]
    for row in rows:
        with case(row):
            examples = encode([rows[0], row], tokenizer).examples
            assert [example["chosen"] for example in examples] == [True, False] * 2
            assert [example["pair"] for example in examples] == [0, 0, 1, 1]
            assert [learned(tokenizer, example) for example in examples] == [["4.<|im_end|>"], ["5.<|im_end|>"]] * 2
            assert examples[0]["input_ids"] == examples[2]["input_ids"]
    assert encode([{**rows[0], "pair": 7, "weight": 2}], tokenizer).examples[1]["weight"] == 2
    whole = {"chosen": "Human: 2+2? Assistant: 4.", "rejected": "Human: 2+2? Assistant: 5."}
    plain = family("mistral")
    texts = [(spelled(plain, e["input_ids"]), learned(plain, e)) for e in encode([whole], plain).examples]
    assert texts[0] == ("<s>Human: 2+2? Assistant: 4.</s>", [" 4.</s>"]) and texts[1][1] == [" 5.</s>"]


def test_columns_named_by_the_user():
    tokenizer, expected = family("chatml"), encode([ONE_TURN["messages"]], family("chatml"))
    both = {"question": "2+2?", "answer": "no", "prompt": "no", "completion": "It is 4.", "note": [USER, ANSWER]}
    for columns in (("question", "completion"), (None, "note")):
        encoded = encode([both], tokenizer, prompt_column=columns[0], completion_column=columns[1])
        assert encoded == expected and set(encoded.report.ignored) == set(both) - set(columns)
    rows = load_rows([both], prompt_column="question", completion_column="completion")
    assert encode(rows, tokenizer) == encode(rows[:1], tokenizer) == expected
    assert ignored_keys(rows) == ["answer", "note", "prompt"]
    pairs = encode(
        [{"q": "2+2?", "good": "4.", "bad": "5."}], tokenizer, prompt_column="q", completion_column="good,bad"
    )
    assert [example["chosen"] for example in pairs.examples] == [True, False]
    text = encode([{"body": "abc", "text": "no"}], family("mistral"), completion_column="body")
    assert spelled(family("mistral"), text.examples[0]["input_ids"]) == "<s>abc"
    for options, message in (
        (dict(prompt_column="q"), "prompt_column='q' goes with completion_column"),
        (dict(completion_column="a,b,c"), "must be one column, or the chosen and the rejected one"),
        (dict(completion_column=""), "must be names of columns"),
        (dict(prompt_column="prompt", completion_column="reply"), "row 1: there is no column 'reply', only "),
    ):
        with pytest.raises(InputError, match=message):
            encode([both], tokenizer, **options)


def test_ignored_columns_are_named_once():
    row = {**ONE_TURN["messages"], "id": 3, "weight": 2.0, "source": None, "tools": None}
    encoded = encode([row, {**row, "url": "x"}], family("chatml"))
    assert encoded.report.ignored == ["id", "url"] and encoded.examples[1]["weight"] == 2.0
    assert "ignored: id, url" in encoded.report.line()


def test_rows_that_cannot_be_used_say_why():
    tokenizer = family("chatml")
    for row, message in [
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [{**ANSWER, "weight": 0}]}, "every assistant turn has weight 0"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "messages is empty: nothing to learn"),
        ({"messages": [USER, {"role": "assistant"}]}, "turn 2 of role 'assistant' has no content"),
        ({"messages": [USER, {"role": "poet", "content": "x"}]}, "turn 2 needs a role"),
        ({"messages": [USER, {**ANSWER, "content": [{"type": "image", "url": "x"}]}]}, "only parts .* are read"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "add"}]}, "tool_calls must be JSON"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"arguments": {}}]}]}, "needs a name and arguments"),
        ({**ONE_TURN["messages"], "tools": "add"}, "tools must be JSON"),
        ({**ONE_TURN["messages"], "tools": [3]}, "list of JSON schemas"),
        ({"system": "Be rude.", "messages": [SYSTEM, USER, ANSWER]}, "two system prompts"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same: no preference"),
        ({"chosen": "a b", "rejected": "a "}, "rejected is all prompt"),
        ({"prompt": "a", "completion": "b", "problem": "a", "solution": "b"}, "write --prompt-column prompt --completion"),
        ({**ONE_TURN["messages"], "chosen": "a", "rejected": "b"}, "--completion-column chosen,rejected to choose"),
        ({"query": "a", "response": "b"}, r"columns \['query', 'response'\] are of no known shape"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "history 1 must be a pair"),
        ({**ONE_TURN["messages"], "weight": "heavy"}, "weight must be a finite number"),
        ({**ONE_TURN["messages"], "critical": [True]}, "critical has 1 values, but the row has"),
        ({"prompt": "a", "completion": "\ud800"}, "completion is no text: it has half of a surrogate pair"),
    ]:  # fmt: skip
        with case(row, message):
            with pytest.raises(InputError, match=rf"row 1: .*{message}"):
                encode([row], tokenizer)
