"""Rows from disk, their labels, and tokens from text."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import case
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHARACTERS, letters, llama

import qlens
from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE
from qlens.data.compatibility import check_same_tokenizer
from qlens.data.examples import encode
from qlens.data.from_text import tokens_from_examples, tokens_from_text
from qlens.data.models import load_model, load_tokenizer
from qlens.data.rows import ignored_keys, load_rows, split

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
PAIR = {"prompt": "ab", "completion": "cd"}
CHAT = (
    "{% for m in messages %}{{ '|' + m.role[0] + ':' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '|a:' }}{% endif %}"
)


def spelled(tokenizer, example: dict) -> tuple[str, str]:
    """The text of an example, and the same with dots where nothing is learned."""
    pieces = tokenizer.convert_ids_to_tokens(example["input_ids"])
    learned = [piece if label != IGNORE else "." for piece, label in zip(pieces, example["labels"], strict=True)]
    assert all(label in (IGNORE, i) for label, i in zip(example["labels"], example["input_ids"], strict=True))
    return "".join(pieces), "".join(learned)


@pytest.fixture
def write(tmp_path):
    """A file of the given lines."""

    def to(*lines: object) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
        return path

    return to


TURNS = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]


def test_rows_are_read_unchanged(write):
    for row in [{"question": "1?", "answer": "2"}, PAIR, {"messages": TURNS}, {"text": "héllo"}]:
        with case(row):
            assert load_rows(write(row, b"", row, b"  ")) == [row, row]


def test_a_bad_line_is_named(write):
    for line, message in [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([1], "must be an object, got list"),
        ({"prompt": "a", "complete": "b"}, r"columns \['complete', 'prompt'\] are of no known shape"),
        ({"prompt": "ab", "chosen": "cd", "id": 3}, "no known shape"),
        ({"prompt": "a", "completion": 3}, "completion must be a string, got int"),
        ({"prompt": "a", "completion": " "}, "completion is empty: nothing to learn"),
        ({"text": "a"}, "a row of text, but the rows before are of prompt/completion"),
        (
            {"prompt": "a", "completion": "b", "question": "a", "answer": "b"},
            "two shapes.*--completion-column completion or",
        ),
        ({"messages": []}, "messages must be a list of turns"),
        ({"messages": [{"role": "user"}]}, "turn 1 of role 'user' has no content"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "turn 1 needs a role"),
        ({"messages": [{"role": "user", "content": 1}]}, "needs content that is a string"),
        ({"messages": TURNS[:1]}, "no assistant turn"),
    ]:
        with case(line, message):
            with pytest.raises(InputError, match=rf"data.jsonl, line 3: .*{message}"):
                encode(write(PAIR, b"", line), letters())


def test_files_without_rows_are_refused(write, tmp_path):
    with pytest.raises(InputError, match="is empty"):
        load_rows(write(b"\n"))
    with pytest.raises(InputError, match="is not there, or is no file"):
        load_rows(tmp_path / "nope.jsonl")


def test_labels_without_a_chat_template():
    for row, text, learned in [
        (PAIR, "<s>ab\ncd</s>", "....cd</s>"),
        ({"question": "ab", "answer": "cd"}, "<s>ab\ncd</s>", "....cd</s>"),
        ({"text": "abc"}, "<s>abc", ".abc"),
        ({"messages": [*TURNS, *TURNS]}, "<s>ab\ncd</s>ab\ncd</s>", "....cd</s>...cd</s>"),
        ({"messages": [*TURNS, TURNS[0]]}, "<s>ab\ncd</s>", "....cd</s>"),
    ]:
        with case(row, text, learned):
            tokenizer = letters()
            assert spelled(tokenizer, encode([row], tokenizer, None).examples[0]) == (text, learned)


def test_a_tokenizer_without_special_tokens():
    tokenizer = letters(special=False)
    assert spelled(tokenizer, encode([PAIR], tokenizer, None).examples[0]) == ("ab\ncd", "...cd")
    assert spelled(tokenizer, encode([{"text": "abc"}], tokenizer, None).examples[0]) == ("abc", ".bc")
    with pytest.raises(InputError, match="row 2: no token of it would be supervised"):
        encode(["abc", "a"], tokenizer, None)


def test_prompt_tokens_do_not_merge_with_the_completion():
    tokenizer = letters(order=[*CHARACTERS, "\nc"])
    example = encode([PAIR], tokenizer, None).examples[0]
    assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == ["<s>", "a", "b", "\n", "c", "d", "</s>"]
    assert spelled(tokenizer, example)[1] == "....cd</s>"


def test_labels_with_a_chat_template_cover_every_assistant_turn_to_its_end_token():
    tokenizer = letters(CHAT)
    example = encode([{"messages": [*TURNS, *TURNS]}], tokenizer, None).examples[0]
    text, learned = spelled(tokenizer, example)
    assert text == "|u:ab</s>\n|a:cd</s>\n" * 2
    assert learned == ("." * len("|u:ab.\n|a:") + "cd</s>.") * 2  # </s> is one token
    pair = encode([PAIR], tokenizer, None).examples[0]
    assert spelled(tokenizer, pair)[0] == "|u:ab</s>\n|a:cd</s>\n"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewriting = "{% for m in messages %}{{ 'abcdef'[messages|length] ~ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="row 1: the chat template writes what comes before turn 2 differently"):
        encode([{"messages": [*TURNS, *TURNS]}], letters(rewriting), None)


def test_a_template_that_raises_is_refused():
    with pytest.raises(InputError, match="row 1: the chat template refuses these turns: no"):
        encode([PAIR], letters("{{ raise_exception('no') }}"), None)


def test_tokens_from_text_take_paths(tmp_path):
    for seed, name in enumerate(("model", "teacher")):
        llama(seed).save_pretrained(tmp_path / name)
    rows = [("ab", "cd")]
    by_path = qlens.Tokens.from_text(tmp_path / "model", letters(), rows, teacher=str(tmp_path / "teacher"))
    by_module = qlens.Tokens.from_text(llama(0), letters(), rows, teacher=llama(1))
    assert torch.equal(by_path.logits, by_module.logits) and torch.equal(by_path.teacher, by_module.teacher)
    with pytest.raises(InputError, match="reference: model folder .*nope. is not there"):
        qlens.Tokens.from_text(llama(), letters(), rows, reference=tmp_path / "nope")


def test_the_repr_of_encoded_rows():
    encoded = encode([PAIR, "abc"], letters())
    assert encode([PAIR], letters()) == encode([PAIR], letters(), None)
    assert (
        repr(encoded)
        == "<Encoded: 2 examples, 11 tokens, 6 of them supervised; use .examples, dicts of input_ids and labels>"
    )
    assert encoded.to_frame().to_dict("list") == {"tokens": [7, 4], "supervised": [3, 3]}
    assert encoded.to_dict() == {"examples": list(encoded.examples), "dropped": 0} and len(encoded) == 2
    assert "<th>supervised</th><td>6</td>" in encoded._repr_html_()
    assert "2 rows dropped" in repr(encode([PAIR, PAIR, "a"], letters(), 4))


def test_long_rows_are_dropped_and_counted():
    rows = [{"text": "a" * length} for length in (3, 9, 4, 20)]
    encoded = encode(rows, letters(), 5)
    assert [len(example["input_ids"]) for example in encoded.examples] == [4, 5]
    assert encoded.dropped == 2
    with pytest.raises(InputError, match="max_length=2 drops all 4 rows: the shortest has 4 tokens"):
        encode(rows, letters(), 2)
    with pytest.raises(InputError, match="rows is empty"):
        encode([], letters(), 5)


@given(count=st.integers(2, 30), seed=st.integers(0, 9), data=st.data())
def test_split_parts_are_disjoint_complete_and_repeatable(count, seed, data):
    rows = list(range(count))
    held_out = data.draw(st.integers(1, count - 1))
    train, rest = split(rows, held_out, seed)
    assert sorted(train + rest) == rows and len(rest) == held_out
    assert train == sorted(train) and rest == sorted(rest)
    assert split(rows, held_out, seed) == (train, rest)


def test_split_by_share_and_what_it_refuses():
    assert [len(part) for part in split(range(10), 0.2, 0)] == [8, 2]
    assert split(range(99), 50, 0) != split(range(99), 50, 1)
    for held_out in (0, 10, 0.01, 1.0, -1):
        with pytest.raises(InputError, match=f"held_out={held_out} of 10 rows"):
            split(range(10), held_out, 0)


def test_tokens_from_text_hold_the_models_logits():
    for batch_size in [1, 2, 8]:
        with case(batch_size):
            model, teacher, tokenizer = llama().train(), llama(1), letters()
            rows = ["abcde", ("ab", "cd"), {"text": "zyx"}]
            tokens = tokens_from_text(model, tokenizer, rows, teacher=teacher, batch_size=batch_size)
            logits, labels, taught, sequence = [], [], [], []
            for number, (text, first) in enumerate([("<s>abcde", 1), ("<s>ab\ncd</s>", 4), ("<s>zyx", 1)]):
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                logits += list(model(ids).logits[0, first - 1 : -1].detach())
                taught += list(teacher(ids).logits[0, first - 1 : -1].detach())
                labels += ids[0, first:].tolist()
                sequence += [number] * (ids.shape[1] - first)
            assert tokens.labels.tolist() == labels and tokens.require("sequence").tolist() == sequence
            torch.testing.assert_close(tokens.logits, torch.stack(logits), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(tokens.teacher, torch.stack(taught), atol=1e-5, rtol=1e-5)
            assert not tokens.logits.requires_grad and model.training and tokens.reference is None


def test_text_that_does_not_fit_is_refused():
    for rows, options, message in [
        (["ab", "a" * 32], {}, "row 2 has 33 tokens, but the model's context is 32"),
        (["ab" * 5], {"teacher": llama(context=8)}, "row 1 has 11 tokens, but the teacher's context is 8"),
        (
            ["ab"],
            {"reference": llama(vocab=9)},
            "reference has a vocabulary of 9, the model of 32, and their tokenizer has a token",
        ),
        (["ab"], {"model": llama(vocab=4)}, "row 1 has a token 6, but the model's vocabulary is 4"),
        ("ab", {}, "data file .ab. is not there"),
        ([], {}, "rows must be a non-empty list"),
        ([3], {}, "row 1: a row must be an object, got int"),
    ]:
        with case(rows, options, message):
            with pytest.raises(InputError, match=message):
                tokens_from_text(rows=rows, tokenizer=letters(), **{"model": llama(), **options})


def test_real_tokenizer_keeps_a_prompts_tokens_and_counts_what_is_too_long():
    if not SHARED.is_dir():
        pytest.skip("the real data is not there (shared/data beside the repository)")
    tokenizer = load_tokenizer(SHARED / "models/stories260k")
    rows = load_rows(SHARED / "gsm8k/train.jsonl")[:300]
    encoded = encode(rows, tokenizer, 256)
    assert encoded.dropped + len(encoded.examples) == 300 and 0.5 < encoded.dropped / 300 < 0.9
    remaining = iter(encoded.examples)
    for row in rows:
        prompt = tokenizer(row["question"] + "\n")["input_ids"]  # as it would be tokenized for generation
        whole = tokenizer(row["question"] + "\n" + row["answer"])["input_ids"] + [tokenizer.eos_token_id]
        if len(whole) <= 256:
            example = next(remaining)
            assert example["input_ids"] == whole
            assert example["labels"] == [IGNORE] * len(prompt) + whole[len(prompt) :]
    assert next(remaining, None) is None


def test_real_models_match_recorded_values():
    if not SHARED.is_dir():
        pytest.skip("the real data is not there (shared/data beside the repository)")
    tokenizer = load_tokenizer(SHARED / "models/stories260k")
    check_same_tokenizer(tokenizer, load_tokenizer(SHARED / "models/llama2xs-279k"))
    stories = (SHARED / "tinystories/sample.txt").read_text().split("<|endoftext|>")
    student, teacher = (load_model(SHARED / "models" / name) for name in ("llama2xs-279k", "stories260k"))
    texts = [story.strip() for story in stories[1:] if len(tokenizer(story)["input_ids"]) <= 256]
    tokens = tokens_from_text(student, tokenizer, texts[:40], teacher=teacher)
    nll = F.cross_entropy(tokens.logits, tokens.labels).item()
    teacher_nll = F.cross_entropy(tokens.teacher, tokens.labels).item()
    assert nll == pytest.approx(2.08, abs=0.25) and teacher_nll == pytest.approx(1.46, abs=0.25)


def test_columns_of_the_data_become_fields_of_tokens(write):
    rows = [
        {"text": "ab", "id": 7, "weight": 0.5, "critical": [True, False, True], "pair": 3},
        {"text": "c", "id": 8, "weight": 2, "critical": [1, 1], "pair": 4},
    ]
    rows_read = load_rows(write(*rows))
    assert rows_read == rows and ignored_keys(rows_read) == ["id"]
    examples = encode(rows_read, letters(), None).examples
    tokens = tokens_from_examples(llama(), examples)
    assert tokens.weight.tolist() == [0.5, 0.5, 2.0] and tokens.pair.tolist() == [3, 3, 4]
    assert tokens.critical.tolist() == [False, True, True]  # of the labels a, b and c
    assert qlens.get("cft").target(tokens).scale.shape == (3,)
    with pytest.raises(InputError, match="row 1: critical has 2 values, but the row has 3 tokens"):
        encode([rows[0] | {"critical": [True, False]}], letters(), None)
    with pytest.raises(InputError, match="line 2: column 'weight' must be in every row or in none"):
        encode(write({"text": "a", "weight": 1}, {"text": "b"}), letters())


def test_chat_templates_run_in_bounded_time_and_length(monkeypatch):
    for template, message in [
        ("{{ 1 / 0 }}", "row 1: the chat template fails on these turns: ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "has not ended after 0.2 s"),
        ("{{ 9**9**9 }}", "raises to a power"),
        ("{{ 'a' * 2000 }}", "writes 2000 characters: at most 1000"),
        ("{{ '\ud800' }}", "half of a surrogate pair"),
    ]:
        with case(template, message):
            monkeypatch.setattr("qlens.data.chat_templates.limits.SECONDS", 0.2)
            monkeypatch.setattr("qlens.data.chat_templates.limits.CHARACTERS", 1000)
            with pytest.raises(InputError, match=message):
                encode([PAIR], letters(template=template), None)


def test_duplicate_keys_and_empty_files_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    for text, says in (
        ('{"text": "ab", "text": "cd"}\n', "rows.jsonl, line 1: not JSON: the key 'text' is there twice"),
        ("", "is empty"),
        ("\n \n", "is empty"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=says):
            encode(file, letters())
