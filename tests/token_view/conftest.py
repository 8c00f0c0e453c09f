"""The example of a token view and its page, and a cache of its own for every test that ranks."""

import pytest
from example_view import example_view


@pytest.fixture(scope="module")
def view():
    return example_view()


@pytest.fixture(scope="module")
def file(view, tmp_path_factory):
    return view.save(tmp_path_factory.mktemp("page") / "view.html")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QLENS_CACHE", str(folder))
    return folder
