"""The token view's file: in a notebook's iframe, its content policy, its size."""

import re

import numpy as np
from example_view import example_view


def test_a_notebook_shows_a_view_in_an_iframe(open_page, view, tmp_path):
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><meta charset=utf-8><p id=mine>cell</p>{view._repr_html_()}", encoding="utf-8")
    page = open_page(notebook)
    frame = page.frame_locator("iframe")
    frame.locator("html[data-ready]").wait_for()
    frame.locator('[data-n="3"]').first.click()
    assert "token 6 of" in frame.locator("#detail .where").inner_text()
    assert (
        page.frames[1].evaluate("(() => { try { return parent.document.title; } catch { return 'kept out'; } })()")
        == "kept out"
    )


def test_the_content_policy_blocks_scripts_and_requests(file):
    source = file.read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', source)
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert not re.search(
        r"""(src|href)=|url\(|@import|https?://""", source.replace("src=x", "").replace("src\\u003d", "")
    )


def test_four_thousand_tokens_with_twenty_candidates_stay_small(tmp_path):
    draw = np.random.default_rng(0)
    pieces = [f"p{k}" for k in range(600)]
    view = example_view([draw.integers(0, 600, 402).tolist() for _ in range(10)], pieces, candidates=20)
    assert len(view.summary) == 4000 and view.summary.ids.shape[1] == 20
    assert view.save(tmp_path / "large.html").stat().st_size < 5e6
