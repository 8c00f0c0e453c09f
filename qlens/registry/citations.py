"""Citations: entries of ``variants/references.bib`` by key."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

from qlens.core.errors import UnknownName

FILE = Path(__file__).parents[1] / "variants" / "references.bib"


@functools.cache
def references() -> Mapping[str, str]:
    """The entries of ``references.bib`` by key, each as it stands in the file.

    Example:
        >>> references()["brier1950"].splitlines()[0]
        '@article{brier1950,'
    """
    entries = re.findall(r"^@\w+\{.*?^\}", FILE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return {entry[entry.index("{") + 1 : entry.index(",")]: entry for entry in entries}


def citation(key: str) -> str:
    """One BibTeX entry.

    Args:
        key: a key of ``references.bib``, or an entry written out, which is returned as it is.

    Raises:
        UnknownName: no such key.
    """
    if key.startswith("@"):
        return key
    if key not in references():
        raise UnknownName.among("key of references.bib", key, references())
    return references()[key]
