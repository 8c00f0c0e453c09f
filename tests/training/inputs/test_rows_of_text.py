"""QTrainer on rows of text: encoded with the tokenizer that is given or lies beside the model, refused without one."""

import pytest
import torch
from cases import case
from datasets import Dataset, load_dataset
from tiny_models import MARKED, letters, llama, parameters
from torch.testing import assert_close

import qlens
from qlens.core.errors import InputError

ROWS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
    for word in ("hello", "lamp", "tree", "quick")
]


def trained(make, examples, **options):
    trainer = make("dft", model=options.pop("model", None) or llama(context=64), examples=examples, **options)
    trainer.train()
    return parameters(trainer.model)


def test_a_dataset_of_messages_trains_as_its_encoded_rows(make, tmp_path):
    tokenizer = letters(MARKED)
    expected = trained(make, qlens.encode(ROWS, tokenizer).examples)
    assert float((expected - parameters(llama(context=64))).norm()) > 1e-3
    lines = Dataset.from_list(ROWS)
    lines.to_json(tmp_path / "rows.jsonl")
    loaded = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "c"))
    for name, data in {
        "list": ROWS,
        "dataset": lines,
        "file": loaded,
        "encoded": qlens.encode(ROWS, tokenizer),
    }.items():
        with case(name):
            assert_close(trained(make, data, processing_class=tokenizer), expected, rtol=0, atol=0)


def test_the_tokenizer_beside_a_model_given_by_its_path_is_used(make, tmp_path):
    folder = tmp_path / "model"
    llama(context=64).save_pretrained(folder)
    letters(MARKED).save_pretrained(folder)
    expected = trained(make, ROWS, processing_class=letters(MARKED))
    assert_close(trained(make, Dataset.from_list(ROWS), model=folder), expected, rtol=0, atol=0)


def test_evaluation_sets_are_encoded_too(make):
    options = dict(processing_class=letters(MARKED), model=llama(context=64))
    trainer = make("sft", examples=ROWS, eval_dataset={"a": Dataset.from_list(ROWS), "b": ROWS[:2]}, **options)
    metrics = trainer.evaluate()
    assert metrics["eval_a_nll"] > 0 and metrics["eval_b_nll"] > 0
    assert trainer.evaluate(Dataset.from_list(ROWS))["eval_nll"] == pytest.approx(metrics["eval_a_nll"])
    assert torch.tensor(trainer.predict(ROWS[:1]).predictions).ndim == 3


def test_rows_of_text_without_a_tokenizer_are_refused_with_the_line_to_write(make):
    for data in (ROWS, Dataset.from_list(ROWS)):
        with pytest.raises(
            InputError, match=r"rows of text \(messages\), and there is no tokenizer: give processing_class=Auto"
        ):
            make("sft", examples=data)
    with pytest.raises(InputError, match="processing_class is 'gpt2'"):
        make("sft", examples=ROWS, processing_class="gpt2")
    with pytest.raises(InputError, match="train_dataset: row 1"):
        make("sft", examples=[{"words": "a"}], processing_class=letters())


def test_a_collator_of_the_user_gets_the_rows_as_they_are(make):
    seen = []

    def collator(rows):
        seen.extend(rows)
        encoded = qlens.encode([{"messages": row["messages"]} for row in rows], letters(MARKED)).examples
        return qlens.data.collator.collate(encoded)

    end = trained(make, ROWS, data_collator=collator, remove_unused_columns=False)
    assert seen and "messages" in seen[0]
    assert float((end - parameters(llama(context=64))).norm()) > 1e-3
