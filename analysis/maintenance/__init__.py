"""Maintenance: commands that rebuild the stored results of this repository.

``readme_figures`` draws the figures of the pages, ``run_notebooks`` executes the notebooks, ``simulate_intervals`` measures
the coverage of intervals and tests, ``identification`` checks that the lens identifies every method, and
``mutations`` that the tests catch faults.
"""
