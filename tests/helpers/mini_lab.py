"""A small setting of the lab, built in seconds."""

from qlens.lab import Annotator, Problem, Setting

MINI = Setting(
    name="mini",
    corpus=Annotator(slip=(0.2, 0.2, 0.2), false=(0.2, 0.2, 1.0)),
    tutor=Annotator(slip=(0.05, 0.05, 0.05)),
    scribe=Annotator(slip=(0.1, 0.1, 0.1)),
    noise=0.4,
    depth=2,
    modulus=6,
    demonstrations=60,
    validation=8,
    test=12,
    width=16,
    layers=1,
    heads=2,
    corpus_rows=80,
    pretrain_steps=6,
    teach_steps=4,
    pretrain_batch=8,
)
PROBLEM = Problem(7, (("plus", 5), ("minus", 3), ("times", 3)))  # 7 + 5 = 2, 2 - 3 = 9, 9 * 3 = 7
