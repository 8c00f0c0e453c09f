"""Loading rows: every kind of file gives the same rows, and says where a bad one is."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import case
from small_tokenizers import family

import qlens
from qlens.core.errors import InputError
from qlens.data import encode, load_rows, split

ROWS = [
    {"question": "2+2?", "answer": 'It is "4",\nI think.', "id": 1},
    {"question": "é?", "answer": "001", "id": 2},
]
CHATS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "tool", "content": "c"},
            {"role": "assistant", "content": "d"},
        ]
    },
]


@pytest.fixture
def files(tmp_path):
    """The same rows in every kind of file, by name."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text("\n" + lines, encoding="utf-8-sig")
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    frame = datasets.Dataset.from_list(ROWS).to_pandas()
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_csv(tmp_path / "rows.tsv", index=False, sep="\t")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=1)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    for number, row in enumerate(ROWS):
        (tmp_path / "folder" / f"train-{number}.jsonl").write_text(json.dumps(row))
    return {path.name: path for path in tmp_path.iterdir()}


def test_every_source_gives_the_same_examples(files):
    tokenizer, expected = family("chatml"), encode(ROWS, family("chatml"))
    for name, path in files.items():
        with case(name):
            encoded = encode(path, tokenizer)
            assert encoded == expected and encoded.report.ignored == ["id"]
            assert len(load_rows(str(path))) == 2
    for source in (datasets.Dataset.from_list(ROWS), iter(ROWS), tuple(ROWS), load_rows(ROWS)):
        assert encode(source, tokenizer) == expected
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    assert encode(both, tokenizer, split="train") == expected


def test_nothing_of_a_table_is_filled_in_or_guessed(tmp_path):
    pq.write_table(pa.Table.from_pylist(CHATS), tmp_path / "chats.parquet")
    assert list(load_rows(tmp_path / "chats.parquet")) == CHATS  # Arrow has None for content and tool_calls
    assert list(load_rows(datasets.Dataset.from_list(CHATS))) == CHATS
    (tmp_path / "t.csv").write_text('prompt,completion,weight,tools\n007,NA,0.5,"[{""name"": ""f""}]"\n"[1]",1e3,2,\n')
    rows = list(load_rows(tmp_path / "t.csv"))
    assert rows[0] == {"prompt": "007", "completion": "NA", "weight": 0.5, "tools": [{"name": "f"}]}
    assert rows[1] == {"prompt": "[1]", "completion": "1e3", "weight": 2, "tools": ""}
    (tmp_path / "m.csv").write_text('messages\n"[{""role"": ""user"", ""content"": ""a""}]"\n')
    assert load_rows(tmp_path / "m.csv")[0]["messages"] == [{"role": "user", "content": "a"}]


def test_rows_know_their_places(files, tmp_path):
    rows = load_rows(files["rows.jsonl"])
    assert rows.where(0).endswith("rows.jsonl, line 2") and rows.where(-1, short=True) == "line 3"
    assert rows[1:].where(0, short=True) == "line 3" and rows[1:][0] == ROWS[1] == rows[-1]
    assert load_rows(files["folder"]).where(1).endswith("train-1.jsonl, line 1")
    training, held_out = split(rows, 1, seed=0)
    assert len(training) == len(held_out) == 1 and training.where(0) != held_out.where(0)
    with pytest.raises(IndexError, match="row 2 of 2"):
        rows[2]
    pq.write_table(
        pa.Table.from_pylist([{"text": str(at)} for at in range(1500)]), tmp_path / "n.parquet", row_group_size=400
    )
    numbers = load_rows(tmp_path / "n.parquet")
    assert [numbers[at]["text"] for at in (0, 399, 400, 1499, 3)] == ["0", "399", "400", "1499", "3"]


def test_splits_of_folders(tmp_path):
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{"text": name}]), tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "README.md").write_text("data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    with pytest.raises(InputError, match="has the splits 'test', 'train': write split=NAME, on the command line"):
        load_rows(tmp_path)
    with pytest.raises(InputError, match="has no split 'dev'"):
        load_rows(tmp_path, "dev")
    assert load_rows(f"{tmp_path}:test") == load_rows(tmp_path, "test") == [{"text": "test-00000-of-00001"}]
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")})
    saved.save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "saved", "test") == [{"text": "test"}]
    with pytest.raises(InputError, match="the splits 'train', 'test'"):
        load_rows(tmp_path / "saved")


def test_sources_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "bad.parquet": b"PAR1", "bad.csv": b'a,b\n1,2\n1,2,3\n"', "bytes.csv": b"a\n\xff\n", "twice.csv": b"a,a\n1,2\n",
        "bad.json": b'[{"text": "a"}', "empty.jsonl": b"", "empty.json": b"", "empty.csv": b"", "header.csv": b"text\n",
        "cut.jsonl.gz": gzip.compress(b'{"text": "a"}' * 99)[:-20], "no.jsonl.gz": b"text", "bytes.jsonl": b'{"text": "\xff"}',
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "nothing").mkdir()
    for name, message in [
        ("bad.parquet", "'bad.parquet' is no Parquet"), ("bad.csv", "'bad.csv' is no CSV"), ("bytes.csv", "no CSV in UTF-8"),
        ("twice.csv", "the column 'a' is there twice"), ("bad.json", "bad.json: not JSON"), ("empty.jsonl", "is empty"),
        ("empty.json", "is empty"), ("empty.csv", "is empty"), ("header.csv", "is empty"),
        ("cut.jsonl.gz", "is cut off|cannot be read"), ("no.jsonl.gz", "cannot be read"),
        ("bytes.jsonl", "bytes.jsonl, line 1: not JSON: 'utf-8' codec"), ("nothing", "has no data file"),
        ("nowhere.jsonl", "'nowhere.jsonl' is not there, .* written NAME:SPLIT"), ("a b:train", "'a b' is no file, and no name"),
        (3, "data must be a path, a data set or a list of rows, got 3"),
    ]:  # fmt: skip
        with case(name, message):
            with pytest.raises(InputError, match=message):
                load_rows(name)
    with pytest.raises(InputError, match="split='train' goes with a folder or a name"):
        load_rows([{"text": "a"}], "train")


def test_a_name_on_the_hub_is_asked_for_only_with_a_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="is not there"):
        load_rows("owner/name")
    assert not asked
    assert (
        load_rows("owner/name:train") == load_rows("owner/name", "train") == load_rows("owner/name:main:train") == ROWS
    )
    assert [arguments for arguments, _ in asked] == [("owner/name", None)] * 2 + [("owner/name", "main")]

    def offline(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match="'owner/name', split 'train', cannot be loaded from the hub: no network"):
        load_rows("owner/name:train")


def test_views_take_every_source(files, models_and_tokenizer):
    model, tokenizer = models_and_tokenizer
    pages = [qlens.view(model, tokenizer, load_rows(files[name]), ["sft"]) for name in ("rows.jsonl", "rows.parquet")]
    pages.append(qlens.view(model, tokenizer, datasets.Dataset.from_list(ROWS), ["sft"]))
    assert pages[0].table.equals(pages[1].table) and pages[0].table.equals(pages[2].table)
    ranking = qlens.rank(model, tokenizer, files["rows.csv"], ["sft"], progress=False)
    assert len(ranking.rows[ranking.rows["by"] == "sft"]) == 2
    tokens = qlens.Tokens.from_text(model, tokenizer, files["rows.jsonl"])
    assert len(tokens) == len(pages[0].table)


@pytest.fixture
def models_and_tokenizer(monkeypatch, tmp_path):
    """A model over bytes and its tokenizer; qlens' cache is a temporary folder."""
    from tiny_models import llama

    monkeypatch.setenv("QLENS_CACHE", str(tmp_path / "cache"))
    tokenizer = family("chatml")
    return llama(vocab=len(tokenizer), context=128), tokenizer
