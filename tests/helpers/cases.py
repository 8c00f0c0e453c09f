"""A context manager that adds the name of a case to its failure, for tests that loop over cases."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def case(*names: object) -> Iterator[None]:
    """Add the names of a case to whatever fails inside."""
    try:
        yield
    except BaseException as error:
        error.add_note("case: " + ", ".join(map(str, names)))
        raise
