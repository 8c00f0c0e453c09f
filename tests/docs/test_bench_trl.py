"""The benchmark against TRL runs on a user's model, and says what exceeds its limits."""

import pytest
from tiny_models import letters, llama

from qlens.analysis.benchmarks import bench, trl_steps


@pytest.mark.filterwarnings("ignore")  # of peft and TRL with newer transformers
def test_steps_are_measured_against_those_of_trl(tmp_path, monkeypatch, capsys):
    llama(context=64).save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    monkeypatch.setattr(trl_steps, "LENGTH", 12)
    monkeypatch.setattr(trl_steps, "METHODS", {"LoRA": ("dft", "target_sft", "asft_anchored")})
    peaks = {"trl": 1.0, "dft": 0.9, "target_sft": 1.0001, "asft_anchored": 1.2}
    monkeypatch.setattr(trl_steps, "_peak", lambda folder, tuning, method: peaks[method])
    bench.main(["step", "--model", str(tmp_path), "--repeats", "2"])
    shown = capsys.readouterr().out
    rows = {line.split()[2]: line for line in shown.splitlines() if "LoRA" in line}
    assert list(rows) == ["dft", "target_sft", "asft_anchored"]
    assert "over in" in rows["asft_anchored"] and "GiB" in rows["asft_anchored"].split("over in")[1]
    assert "GiB" not in rows["dft"].partition("over in")[2]


@pytest.mark.filterwarnings("ignore")
def test_the_peak_of_a_training_is_that_of_its_process(tmp_path, capsys):
    llama(context=512).save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    trl_steps.measure(str(tmp_path), "full", "dft")
    assert 0.01 < float(capsys.readouterr().out) < 8
