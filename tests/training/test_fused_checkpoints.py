"""QTrainer from hidden states and from whole logits on small pretrained checkpoints: the same training, to rounding."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import parameters
from torch.testing import assert_close

from qlens.data.collator import collate
from qlens.data.examples import encode
from qlens.data.models import load_model, load_tokenizer

MODELS = Path(__file__).resolve().parents[3] / "shared/data/models"


def real(texts: int, dtype: torch.dtype):
    """The two checkpoints and some sentences."""
    if not MODELS.exists():
        pytest.skip("needs the checkpoints of ../shared/data")
    student, teacher = (load_model(MODELS / name, dtype=dtype) for name in ("llama2xs-279k", "stories260k"))
    sentences = [
        "Once upon a time there was a little dog.",
        "The cat sat on the mat and looked at Tom.",
        "One day, Lily went to the park with her mom.",
        "They played all day and were very happy.",
    ]
    tokenizer = load_tokenizer(MODELS / "llama2xs-279k")
    rows_ = [{"text": sentences[i % 4] + " " + sentences[(i + i // 4) % 4]} for i in range(texts)]
    return student, teacher, encode(rows_, tokenizer).examples


@pytest.mark.parametrize("spec", ["target_sft", "iw_sft"])
def test_five_steps_on_real_checkpoints_agree_to_rounding(make, spec):
    student, teacher, examples = real(8, torch.float64)
    ends = []
    for fused in (True, False):
        trainer = make(
            spec, model=copy.deepcopy(student), teacher=teacher, reference=teacher, examples=examples, steps=5, fused=fused,
            batch=4, learning_rate=0.05,
        )  # fmt: skip
        trainer.train()
        ends.append(parameters(trainer.model))
    assert float((ends[0] - parameters(student)).norm()) > 1e-3
    assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-10)


def test_forty_steps_drift_no_further_than_sums_reordered(make):
    student, _, examples = real(16, torch.float32)
    ends = {}
    for name, fused, collator in (
        ("whole", False, collate),
        ("reordered", False, lambda batch: collate(batch[::-1])),
        ("engine", True, collate),
    ):
        trainer = make(
            "dft", model=copy.deepcopy(student), examples=examples, steps=40, fused=fused, batch=2,
            data_collator=collator, logging_steps=40, learning_rate=0.02,
        )  # fmt: skip
        trainer.train()
        ends[name] = parameters(trainer.model).double()
    noise = float((ends["reordered"] - ends["whole"]).norm())
    assert 0 < noise < 1e-2 * float((ends["whole"] - parameters(student).double()).norm())
    assert float((ends["engine"] - ends["whole"]).norm()) <= 3 * noise
