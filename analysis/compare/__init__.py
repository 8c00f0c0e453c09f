"""Compare: methods trained side by side under equal conditions.

Read ``comparison`` (the main job), ``config`` (what it will do), ``environments`` (what is trained and scored on),
``recipes`` (how each row is trained), ``jobs`` (independent runs) and ``learning_rates``; ``run_folder`` keeps one
configuration per folder, ``evaluation`` and ``label_noise`` read the trained models.
"""

from qlens.analysis.compare.comparison import compare

__all__ = ["compare"]
