"""Citations: the entries of variants/references.bib and the cards that name them."""

import re

import pytest

import qlens
from qlens.registry import methods
from qlens.registry.citations import citation, references


def test_every_entry_has_title_author_and_year_and_is_cited():
    for key, entry in references().items():
        assert re.match(rf"@\w+{{{key},\n", entry) and entry.endswith("\n}")
        assert all(re.search(rf"^  {field} = {{.+}},$", entry, re.M) for field in ("title", "author", "year")), key
    cited = {key for method in methods().values() for key in method.cites}
    assert set(references()) - cited == {"qlens"}


def test_a_card_names_the_papers_that_it_cites():
    for name, method in methods().items():
        identifiers = re.findall(r"eprint = {([\d.]+)}", method.bibtex)
        assert identifiers or name in ("sft", "brier", "reinforce", "label_kl"), name
        for number in identifiers:
            old_title = name == "label_smoothing" and number == "1512.00567"  # named there by authors and year
            assert number in method.paper or old_title, (name, number)
        assert method.bibtex or name == "sft", name


def test_a_key_that_is_not_there_is_refused_and_an_own_entry_taken():
    with pytest.raises(qlens.UnknownName, match="wu2025df.*Did you mean wu2025dft"):
        qlens.register("misdeclared", cites=("wu2025df",))
    own = "@misc{mine,\n  title = {Mine},\n}"
    assert citation(own) == own
    with qlens.registry.registry.temporary():
        with pytest.warns(DeprecationWarning, match=r"register\(bibtex=\) is deprecated; write cites="):
            qlens.register("mine", bibtex=own)(lambda logits, labels: logits.sum())
        assert qlens.get("mine").method.bibtex == own
