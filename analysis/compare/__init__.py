"""Compare: methods trained side by side under equal conditions.

Read ``comparison`` (the entry), ``config`` (checked arguments), ``environments`` (models and data), ``recipes`` (how each
row is trained), ``jobs`` (independent runs), ``schedule`` (in which order), ``live_table`` (their scores meanwhile) and
``learning_rates``. ``run_folder`` binds a folder to one configuration,
``stored_models`` saves models given as modules, ``evaluation`` and ``label_noise`` score the trained models.
"""

from qlens.analysis.compare.comparison import compare

__all__ = ["compare"]
