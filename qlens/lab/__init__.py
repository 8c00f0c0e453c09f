"""The lab: an embedded world of tiny models in which a loss can be trained and its result verified exactly.

A little language of digit arithmetic, worked out step by step in one of many wordings (``language``); a base model
pretrained on a flawed corpus, a teacher that is better but not perfect, noisy demonstrations, and an exact verifier of
the final answer (``worlds``). Everything follows from the numbers of a ``Setting``.
"""

from qlens.lab.environment import World, build, world
from qlens.lab.language import Demonstration, Problem
from qlens.lab.setting import LESSONS, SETTINGS, Author, Setting

__all__ = ["LESSONS", "SETTINGS", "Author", "Demonstration", "Problem", "Setting", "World", "build", "world"]
