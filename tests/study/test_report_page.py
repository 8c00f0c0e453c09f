"""The report of a comparison in a real browser: no requests, escaped names, readable contrast."""

import pytest
from browser import worst
from example_study import MEANS, example_study

HOSTILE = ["<script>window.hacked=1</script>", '"><img src=x onerror="window.hacked=1">', "\u202eevil"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    means = {name: MEANS[name] for name in ("base", "sft", "target_sft")} | {f"mine.py:{name}": 0.6 for name in HOSTILE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qlens.analysis.plots.save.image.__defaults__", ("png", 40)
        )  # figures are drawn faster when small
        example_study(means, seeds=(0, 1), failed=[f"{name} in one at seed 1: RuntimeError" for name in HOSTILE]).save(
            folder
        )
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_has_contrast_and_makes_no_requests(open_page, report, scheme):
    page = open_page(report, color_scheme=scheme)
    for summary in page.locator("summary").all():
        summary.click()
    contrasts = worst(page)
    assert contrasts[0][0] >= 4.5, contrasts
    pictures = page.locator("img").all()
    assert pictures and all(picture.get_attribute("alt") for picture in pictures)
    assert all(picture.evaluate("node => node.complete && node.naturalWidth > 0") for picture in pictures)


def test_hostile_names_are_escaped_and_the_report_fits_a_phone(open_page, report):
    page = open_page(report)
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 0 and page.locator("img[src=x]").count() == 0
    for name in HOSTILE[:2]:
        assert name in page.locator("body").inner_text()
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360, "on a phone, too"
