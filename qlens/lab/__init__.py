"""The lab: a small arithmetic environment in which any loss can be trained and its result verified exactly.

Read ``setting`` (the numbers that define an environment), ``language`` (problems, solutions and their verifier),
``models`` (tiny Llamas), ``environment`` (base model, imperfect teacher, noisy demonstrations), ``building`` (of them, on
first use) and ``cache`` (where they are stored).

Example:
    >>> import qlens
    >>> sorted(qlens.lab.SETTINGS)
    ['clean-labels', 'poor-teacher', 'strong-prior', 'weak-prior', 'wrong-prior']
"""

from qlens.core.deprecation import renamed_attributes
from qlens.lab.building import build, world
from qlens.lab.environment import World
from qlens.lab.language import Demonstration, Problem
from qlens.lab.setting import LESSONS, SETTINGS, Annotator, Setting

__all__ = ["LESSONS", "SETTINGS", "Annotator", "Demonstration", "Problem", "Setting", "World", "build", "world"]

__getattr__ = renamed_attributes(__name__, {"Author": "Annotator"})
