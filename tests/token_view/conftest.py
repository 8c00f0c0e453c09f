"""The example of a token view, and its page."""

import pytest
from example_view import example_view


@pytest.fixture(scope="module")
def view():
    return example_view()


@pytest.fixture(scope="module")
def file(view, tmp_path_factory):
    return view.save(tmp_path_factory.mktemp("page") / "view.html")
