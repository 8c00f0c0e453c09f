"""Maintenance: commands that rebuild what the repository shows: ``readme_figures``, ``run_notebooks``, ``simulate_intervals`` and
``identification``."""
