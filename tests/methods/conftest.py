"""A registry that tests may add methods to."""

import pytest

from qlens.registry import registry


@pytest.fixture
def temporary_registry():
    """The methods that a test registers are removed after it."""
    with registry.temporary():
        yield
