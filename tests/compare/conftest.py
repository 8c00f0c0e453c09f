"""Comparisons in tests are saved without figures, which take most of their time; the fixture ``figures`` draws them."""

import pytest


@pytest.fixture
def figures():
    """Ask for the figures of run folders."""


@pytest.fixture(autouse=True)
def _without_figures(request, monkeypatch):
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("qlens.analysis.study.report.panels", lambda study: [])
