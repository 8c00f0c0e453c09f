"""A cache of the lab; comparisons are saved without figures, which take most of their time, unless ``figures`` asks."""

import pytest
from mini_lab import MINI

import qlens


@pytest.fixture(scope="module")
def lab_cache(tmp_path_factory):
    """A cache folder with the miniature environment, built once for a module."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLENS_CACHE", str(folder))
        qlens.lab.world(MINI, progress=False)
    return folder


@pytest.fixture
def figures():
    """Ask for the figures of run folders."""


@pytest.fixture(autouse=True)
def _without_figures(request, monkeypatch):
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("qlens.analysis.study.report.panels", lambda study: [])
