"""A study of made-up scores for tests of results, statistics and reports."""

import numpy as np

import qlens
from qlens.analysis.compare.learning_rates import GRID, Choice
from qlens.analysis.compare.recipes import Recipe
from qlens.analysis.study.study import Study

MEANS = {"base": 0.4, "sft": 0.5, "dft": 0.51, "target_sft": 0.8, "target_sft_base_teacher": 0.6}
SETTINGS = ("one", "two")
SHARED = {"k": 8, "steps": 10, "batch_size": 4}


def record(setting, method, seed, scores):
    truth = [
        {"when": when, "belief": belief, "labels": labels, "auroc": auroc, "good": 30, "noisy": 10 * (setting == "one")}
        for (when, belief, labels), auroc in {
            ("start", "trust", "judged"): 0.5,
            ("start", "Q", "judged"): 0.6,
            ("end", "p", "judged"): 0.7 + seed / 10,
        }.items()
    ]
    means = {
        "nll": 1.0,
        "entropy": 1.0,
        "kl_start": 0.1,
        "label_weight": None,
        "negative_mass": None,
        "steps": 1,
        "seconds": 1,
    }
    return {
        "setting": setting, "method": method, "seed": seed, "scores": scores, "diagnostics": means, "truth": truth,
        "curve": [[0, 0.1], [10, 0.2 + seed / 10]],
    }  # fmt: skip


def example_study(means=MEANS, seeds=(0, 1, 2), missing=(), better="higher", failed=(), note=""):
    """A study of scores in eighths around the means."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 0.1, 40)
    records = []
    for setting in SETTINGS:
        for method, mean in means.items():
            for seed in seeds:
                scores = np.clip(np.rint(8 * (mean + hard + rng.normal(0, 0.05, 40))) / 8, 0, 1)
                if (setting, method, seed) not in missing:
                    records.append(record(setting, method, seed, scores.tolist()))
    config = {
        "versions": {"qlens-sft": "0"}, "code": "0", "methods": dict.fromkeys(means), "seeds": list(seeds),
        "settings": dict.fromkeys(SETTINGS, SHARED), "metric": {"name": "avg@8", "better": better, "note": note},
        "noted": {"settings": {"one": {"base": 0.4, "odd_thing": 1}}, "failed": list(failed)},
    }  # fmt: skip
    scores = {"sft": {str(rate): [0.1] for rate in GRID}}
    sft = Recipe(qlens.get("sft"))
    choices = {
        (setting, method): Choice(recipe=sft, learning_rate=GRID[0], origin="record", scores=scores)
        if method == "sft"
        else Choice(recipe=sft, learning_rate=0.5, origin="as sft", scores={})
        for setting in SETTINGS
        for method in means
    }
    return Study.from_records(config, records, choices)
