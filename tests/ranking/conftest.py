"""A cache of its own for every test that ranks."""

import pytest


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QLENS_CACHE", str(folder))
    return folder
