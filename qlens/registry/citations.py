"""Citations: a BibTeX entry from what a card knows of a paper."""


def bibtex(key: str, title: str, year: int, *, arxiv: str = "", author: str = "", venue: str = "") -> str:
    """One ``@misc`` entry, with the fields that are known.

    Example:
        >>> print(bibtex("szegedy2016rethinking", "Rethinking the Inception Architecture", 2016, venue="CVPR"))
        @misc{szegedy2016rethinking,
          title = {Rethinking the Inception Architecture},
          year = {2016},
          note = {CVPR},
        }
    """
    fields = {"title": title, "author": author, "year": str(year), "note": venue}
    if arxiv:
        fields |= {"eprint": arxiv, "archivePrefix": "arXiv"}
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@misc{{{key},", *lines, "}"])
