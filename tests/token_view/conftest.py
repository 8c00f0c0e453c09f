"""The example of a token view, and its page."""

import pytest
from example_view import made


@pytest.fixture(scope="module")
def view():
    return made()


@pytest.fixture(scope="module")
def file(view, tmp_path_factory):
    return view.save(tmp_path_factory.mktemp("page") / "view.html")
