"""Cases of one claim, tested in a loop: a failure names its case."""

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
