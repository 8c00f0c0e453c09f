"""Encoding: what is dropped, truncated and reported, examples in compact arrays, and prompts that keep their tokens."""

import copy
import functools
import json

import numpy as np
import pytest
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import FAMILIES, family, learned, small_tokenizer, spelled
from tiny_models import letters, llama, trainer_in
from torch.utils.data import DataLoader

from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE
from qlens.data import encode, load_rows, split
from qlens.data.collator import collate

PAIR = {"prompt": "ab", "completion": "cd"}


def test_rows_that_are_too_long():
    rows = [{"prompt": "a" * length, "completion": "bcde", "weight": 1.0} for length in (1, 9, 2)]
    tokenizer = letters()
    long = encode(rows, tokenizer, 8)
    assert len(long) == 1 and long.dropped == 2 and long.report.count("dropped") == 2
    assert long.report.line() == (
        "1 examples of 3 rows of prompt/completion; dropped 2: too long, more than 8 tokens (row 2, row 3)"
    )
    left = encode(rows, tokenizer, 7, on_long="truncate_left")
    assert [len(example["input_ids"]) for example in left.examples] == [7] * 3
    for example in left.examples:
        assert learned(tokenizer, example) == ["bcde</s>"] and example["input_ids"][0] == tokenizer.bos_token_id
    assert left.report.count("truncated") == 3 and left.dropped == 0
    right = encode(rows, tokenizer, 6, on_long="truncate_right", on_bad="drop")
    assert [learned(tokenizer, example) for example in right.examples] == [["bcd"], ["bc"]]
    assert right.report.to_frame().to_dict("records") == [
        {"what": "dropped", "reason": "truncated to nothing", "rows": 1, "first": "row 2"},
        {"what": "truncated", "reason": "at the right to 6 tokens", "rows": 2, "first": "row 1, row 3"},
    ]
    with pytest.raises(
        InputError, match="row 2: of its 16 tokens no learned one is among the 6 that truncate_right keeps"
    ):
        encode(rows, tokenizer, 6, on_long="truncate_right")
    with pytest.raises(InputError, match="row 1: 8 tokens, more than max_length=7; on_long='drop', 'truncate_left'"):
        encode(rows, tokenizer, 7, on_long="error")
    for options, message in (
        (dict(max_length=1), "max_length must be at least 2, got 1"),
        (dict(on_long="cut"), "on_long must be one of 'drop', 'truncate_left'"),
        (dict(on_bad="ignore"), "on_bad must be 'error' or 'drop', got 'ignore'"),
    ):
        with pytest.raises(InputError, match=message):
            encode(rows, tokenizer, **options)


def test_columns_per_token_are_truncated_too():
    row = {"text": "abcdef", "weight": [0, 1, 2, 3, 4, 5, 6]}  # of BOS and the letters
    left = encode([row], letters(), 4, on_long="truncate_left").examples[0]
    assert left["weight"] == [0, 4, 5, 6] and left["labels"][0] == IGNORE
    assert encode([row], letters(), 4, on_long="truncate_right").examples[0]["weight"] == [0, 1, 2, 3]
    cut = encode(["abcdef"], letters(special=False), 3, on_long="truncate_left").examples[0]
    assert cut["labels"] == [IGNORE, *cut["input_ids"][1:]]  # nothing that is left predicts the first


def test_a_pair_is_dropped_as_a_whole():
    rows = [{"prompt": "ab", "chosen": "cd", "rejected": "c" * 20}, {"prompt": "ab", "chosen": "c", "rejected": "d"}]
    encoded = encode(rows, letters(), 10)
    assert encoded.dropped == 1 and [example["pair"] for example in encoded.examples] == [1, 1]


@pytest.fixture
def bad_file(tmp_path):
    """Good rows among bad ones of every kind."""
    good = json.dumps(PAIR).encode()
    lines = [
        good, b"", b"{", good, b'{"prompt": "a", "completion": "\xff"}', b'{"prompt": "a", "completion": ""}', b"[1]",
        b'{"prompt": 3, "completion": "a"}', b'{"text": "abc"}', good, b'{"prompt": "a"}',
        b'{"prompt": "a", "completion": "b", "weight": 2}', b'{"prompt": "", "completion": "' + b"c" * 10**6 + b'"}',
    ]  # fmt: skip
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_bad_rows_are_refused_together_or_dropped_and_counted(bad_file):
    with pytest.raises(InputError) as refused:
        encode(bad_file, letters(), 100)
    text = str(refused.value)
    assert text.startswith(f"{bad_file}, line 3: not JSON") and "on_bad='drop' (--on-bad drop) leaves them out" in text
    assert "rows cannot be used: 1 malformed JSON (line 3), 1 invalid UTF-8 (line 5)" in text
    encoded = encode(bad_file, letters(), 100, on_bad="drop")
    assert encoded.examples == encode([PAIR] * 3, letters()).examples
    frame = encoded.report.to_frame()
    assert dict(zip(frame["reason"], frame["first"], strict=True)) == {
        "malformed JSON": "line 3", "invalid UTF-8": "line 5", "empty completion": "line 6", "wrong types": "line 7, line 8",
        "another shape than most rows": "line 9", "unknown shape": "line 11", "other columns than most rows": "line 12",
        "too long, more than 100 tokens": "line 13",
    }  # fmt: skip
    assert (frame["what"] == "dropped").all() and encoded.dropped == frame["rows"].sum() == 9
    assert "<td>malformed JSON</td>" in encoded.report._repr_html_() and "wrong types" in encoded._repr_html_()
    assert json.loads(json.dumps(encoded.report.to_dict()))["counts"]["rows"] == list(frame["rows"])
    with pytest.raises(InputError, match="all 2 rows are dropped: dropped 1: malformed JSON"):
        encode(load_rows(bad_file).select([1, 3]), letters(), on_bad="drop")


def test_most_rows_decide_which_shape_is_another():
    rows = [{"text": "abc"}, PAIR, PAIR, {**PAIR, "weight": 1.0}]
    encoded = encode(rows, letters(), on_bad="drop")
    assert encoded.examples == encode([PAIR, PAIR], letters()).examples
    assert encoded.report.places["dropped", "another shape than most rows"] == ["row 1"]
    with pytest.raises(
        InputError, match="row 2: a row of prompt/completion, but the rows before are of text; 3 of 4 rows"
    ):
        encode(rows, letters())
    with pytest.raises(InputError, match="row 3: column 'weight' must be in every row or in none"):
        encode(rows[2:1:-1] + rows[1:2] + rows[3:], letters())


def test_a_million_characters_are_a_row_like_others():
    encoded = encode([{"prompt": "a", "completion": "b" * 10**6}], letters())
    assert len(encoded.examples[0]["input_ids"]) == 10**6 + 4


def test_a_preview_marks_what_is_learned():
    encoded = encode([PAIR, {**PAIR, "completion": "xyz"}], letters())
    text = "--- 1: 7 tokens, 3 learned\n<s>ab\n⟦cd</s>⟧"
    assert repr(encoded.preview(1)) == str(encoded.preview(1)) == text
    assert encoded.preview().count("---") == 2 and "⟦xyz</s>⟧" in encoded.preview()


def test_examples_are_compact_and_a_training_set(tmp_path):
    rows = [{"prompt": "ab"[: at % 2 + 1], "completion": "c" * (at % 5 + 1), "weight": float(at)} for at in range(20)]
    examples = encode(rows, letters()).examples
    listed = list(examples)
    assert (
        examples[-1] == listed[-1]
        and list(examples[2:9:3]) == listed[2:9:3]
        and examples.select([3, 1])[0] == listed[3]
    )
    assert (
        examples == listed
        and examples[1:] != examples[:-1]
        and "20 dicts of input_ids, labels, weight" in repr(examples)
    )
    with pytest.raises(IndexError):
        examples[20]
    training, held_out = split(examples, 5, seed=0)
    assert sorted(each["weight"] for each in [*training, *held_out]) == list(range(20)) and len(held_out) == 5
    assert copy.deepcopy(examples) == examples
    tokens, supervised = examples[3:5].counts()
    assert list(tokens) == [len(each["input_ids"]) for each in listed[3:5]]
    assert list(supervised) == [sum(label != IGNORE for label in each["labels"]) for each in listed[3:5]]
    assert list(examples.to_dataset()) == listed
    batches = [list(DataLoader(data, batch_size=8, collate_fn=collate)) for data in (examples, listed)]
    assert all((a["labels"] == b["labels"]).all() for a, b in zip(*batches, strict=True))
    trainers = [
        trainer_in(tmp_path / str(at), model=llama(), examples=data) for at, data in enumerate((examples, listed))
    ]
    losses = [trainer.train().training_loss for trainer in trainers]
    assert losses[0] == losses[1]
    assert examples._ids.dtype == np.int32 and examples._learned.dtype == bool


def test_every_row_is_encoded_alike_alone_and_among_many():
    rows = [{"messages": [{"role": "user", "content": "a" * (at % 7)}, {"role": "assistant", "content": "b" * (at % 3 + 1)}]}
            for at in range(1200)]  # fmt: skip
    tokenizer = family("chatml")
    encoded = encode(rows, tokenizer, progress=False)
    assert len(encoded) == 1200
    for at in (0, 511, 512, 1023, 1199):
        assert encoded.examples[at] == encode([rows[at]], tokenizer).examples[0]


@functools.cache
def merging_tokenizers():
    """Tokenizers with tokens that may reach across a border, with a template and without, and one with a prefix space."""
    template, added, _ = FAMILIES["chatml"]
    plain = "{{ messages[0].content }}{% for m in messages[1:] %}{{ m.content }}</s>{% endfor %}"
    return (
        small_tokenizer(None, ["</s>"], MERGES, eos_token="</s>"),
        small_tokenizer(template, added, MERGES, eos_token="<|im_end|>"),
        small_tokenizer(plain, ["</s>"], MERGES, eos_token="</s>"),
        small_tokenizer(None, ["<s>", "</s>"], metaspace=True, bos_token="<s>", eos_token="</s>"),
    )


MERGES = [("Ċ", "Ċ"), ("a", "b"), ("Ġ", "a"), ("b", "Ċ"), ("Ġ", "Ġ")]


@settings(max_examples=60, deadline=None)
@given(prompt=st.text("ab \né", max_size=6), completion=st.text("ab \né", min_size=1, max_size=6).filter(str.strip))
def test_a_prompt_has_the_tokens_it_has_alone_whatever_follows(prompt, completion):
    """Tokens that would merge across the border, and white space that is split by what follows it."""
    template = FAMILIES["chatml"][0]
    for tokenizer in merging_tokenizers():
        if tokenizer.chat_template:
            ask = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        else:
            ask = prompt + "\n"
        example = encode([(prompt, completion)], tokenizer).examples[0]
        ids = tokenizer(ask, add_special_tokens=False)["input_ids"]
        ids = ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]
        assert example["input_ids"][: len(ids)] == ids
        assert set(example["labels"][: len(ids)]) <= {IGNORE}
        (text,) = learned(tokenizer, example)
        whole = spelled(tokenizer, example["input_ids"])
        end = "<|im_end|>" if tokenizer.chat_template == template else "</s>"
        assert whole.endswith(f"{completion}{end}\n" if tokenizer.chat_template == template else completion + end)
        if ids:  # without a prompt nothing predicts the first token; decoded alone, one may lose a space
            assert text.lstrip(" ") == f"{completion}{end}".lstrip(" ")


def test_slow_tokenizers_and_those_with_a_prefix_space():
    from transformers import PreTrainedTokenizer

    class Slow(PreTrainedTokenizer):
        """A tokenizer in Python, a token per character."""

        vocab_size = 256

        def get_vocab(self):
            return {chr(at): at for at in range(256)} | self.added_tokens_encoder

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token) % 256

        def _convert_id_to_token(self, index):
            return chr(index)

    template, added, _ = FAMILIES["chatml"]
    slow = Slow(chat_template=template, eos_token="<|im_end|>", extra_special_tokens=added[:1])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}] * 2
    example = encode([{"messages": turns}], slow).examples[0]
    ends = [at for at, token in enumerate(example["input_ids"]) if token == slow.eos_token_id]
    assert [example["labels"][end] != IGNORE for end in ends] == [False, True, False, True]
    assert sum(label != IGNORE for label in example["labels"]) == 6
    spaced = small_tokenizer(None, ["<s>", "</s>"], metaspace=True, bos_token="<s>", eos_token="</s>")
    example = encode([("ab", "cd")], spaced).examples[0]
    assert spelled(spaced, example["input_ids"]) == "<s> ab\ncd</s>" and learned(spaced, example) == ["cd</s>"]


def test_bos_is_there_once():
    for name in ("llama3", "gemma"):
        with case(name):
            tokenizer = family(name)
            tokenizer.add_bos_token = True
            row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
            for data in (row, "abc", f"{tokenizer.bos_token}abc"):
                assert encode([data], tokenizer).examples[0]["input_ids"].count(tokenizer.bos_token_id) == 1
