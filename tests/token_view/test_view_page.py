"""The token view in a real browser: every control, the keyboard, hostile tokens, contrast, a phone and print."""

import re

import numpy as np
import pytest
from browser import worst
from example_view import HOSTILE, PIECES, PROMPT, ROWS, SPECS


@pytest.fixture
def page(open_page, file):
    page = open_page(file, viewport={"width": 1280, "height": 900})
    page.wait_for_selector("html[data-ready]")
    page.select_option("#metric", label="label weight")
    return page


def token(page, n, side=0):
    return page.locator(f'[data-n="{n}"]').nth(side)


def strength(page, n, side=0):
    return float(token(page, n, side).evaluate("node => getComputedStyle(node).getPropertyValue('--v')"))


def cells(page, row):
    return page.locator(f"#detail .wide >> nth=0 >> tbody tr >> nth={row} >> td").all_inner_texts()


def to_number(number):
    """A number as the page writes it."""
    return float(number.replace("−", "-").replace("+", ""))


def test_the_text_is_coloured_by_the_metric_chosen(page, view):
    page.select_option("#left", label="gem")
    page.select_option("#right", label="kd")
    metrics = page.evaluate("JSON.parse(document.getElementById('data').textContent).metrics")
    assert page.locator("#metric option").all_inner_texts() == [metric["name"] for metric in metrics]
    assert len(metrics) == 15
    for at, metric in enumerate(metrics):
        page.select_option("#metric", index=at)
        key, own = metric["key"], metric["method"]
        for side, spec in enumerate(["gem", "kd"] if own else [None]):
            models = view.summary.models.rename(columns={"entropy": "entropy_p"}).assign(supervised=1.0)
            values = view.summary.methods[spec][key] if own else models[key]
            for n in (0, 5, 12):
                x = float(values[n])
                part = np.log(x) / np.log(metric["high"]) if metric["log"] else abs(x) / metric["high"]
                expected = 0 if np.isnan(x) else min(1, part)
                assert strength(page, n, side) == pytest.approx(expected, abs=2e-3), key
                classes = token(page, n, side).get_attribute("class").split()
                assert ("none" in classes, "below" in classes) == (np.isnan(x), x < 0), key
        assert page.locator("#legend .says").inner_text().startswith(f"{metric['name']}: ")
        assert page.locator(".pane:visible").count() == (1 + own) * len(ROWS)


def test_negative_mass_is_visible_whatever_the_colours_mean(page, view):
    for metric in range(page.locator("#metric option").count()):
        page.select_option("#left", label="sft")
        page.select_option("#metric", index=metric)
        page.select_option("#left", label="gem")
        for n, mass in enumerate(view.summary.methods["gem"]["negative_mass"]):
            assert ("off" in token(page, n).get_attribute("class").split()) == (mass > 1e-6)
    marked = token(page, int(view.summary.methods["gem"]["negative_mass"].argmax()))
    line = marked.evaluate(
        "node => getComputedStyle(node).textDecorationLine + ' ' + getComputedStyle(node).textDecorationStyle"
    )
    assert line == "underline double", "a form, not a colour alone"


def test_the_table_shows_p_and_q_and_what_the_target_adds(page, view):
    page.select_option("#left", label="gem")
    page.select_option("#right", label="dft")
    token(page, 4).hover()
    n, size = 4, view.summary.ids.shape[1]
    label, sides = view.summary.models["label"][n], [SPECS.index("gem"), SPECS.index("dft")]
    rows = [cells(page, row) for row in range(size + 2)]
    assert rows[0][0].endswith(" label") and len(rows[0]) == 7
    at = view.summary.ids[n].tolist().index(label)
    for row, k in [(0, at), (1, 0 if at else 1)]:
        p, t = view.summary.probs[n, k], view.summary.teacher[n, k]
        moves = view.summary.moves[sides, n, k]
        expected = [p, t, *(x for move in moves for x in (p + move, move))]
        assert [to_number(x) for x in rows[row][1:]] == pytest.approx(expected, abs=6e-4)
    assert rows[-2][0] == "all others" and rows[-1][0] == "sum" and to_number(rows[-1][3]) == 1
    assert to_number(rows[-2][4]) == pytest.approx(-view.summary.moves[sides[0], n].sum(), abs=6e-4)
    biggest = int(np.abs(view.summary.moves[sides[0], n]).argmax())
    assert any(
        to_number(row[4]) == pytest.approx(view.summary.moves[sides[0], n, biggest], abs=6e-4) for row in rows[:-2]
    )


def test_tokens_are_pinned_and_released_by_click_and_key(page):
    title = page.locator("#detail .where")
    token(page, 3).click()
    token(page, 8).hover()
    assert "token 6 of" in title.inner_text() and "pinned" in title.inner_text()
    assert token(page, 3, 1).get_attribute("aria-pressed") == "true", "in both panes"
    page.keyboard.press("Escape")
    token(page, 8).hover()
    assert "token 11 of" in title.inner_text() and "pinned" not in title.inner_text()
    token(page, 8).click()
    page.keyboard.press("Enter")
    assert page.locator(".pinned").count() == 0
    page.keyboard.press(" ")
    assert page.locator(".pinned").count() == 2


def focused(page):
    return page.evaluate("document.activeElement.dataset.n ?? document.activeElement.id")


def test_everything_works_from_the_keyboard_alone(page):
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(focused(page))
    order = ["theme", "metric", "left", "right", "order", "find", "previous", "next"]
    assert reached[: len(order)] == order and "0" in reached and "detail" in reached
    assert sum(each.isdigit() for each in reached) == 1, "one stop for all tokens"
    token(page, 0).focus()
    steps = "ArrowRight 1 ArrowRight 2 ArrowLeft 1 End 10 ArrowRight 11 Home 11 PageUp 0 PageDown 11 PageDown 17 PageDown 17"
    for key, expected in zip(steps.split()[::2], steps.split()[1::2], strict=True):
        page.keyboard.press(key)
        assert focused(page) == expected, key
    page.keyboard.press("ArrowUp")
    assert 11 <= int(focused(page)) < 17
    page.keyboard.press("ArrowDown")
    assert int(focused(page)) >= 11
    page.keyboard.press("/")
    assert focused(page) == "find"
    page.keyboard.press("Escape")
    assert focused(page).isdigit()
    token(page, 4, 1).click()
    page.select_option("#metric", label="NLL")
    assert page.locator('.t[tabindex="0"]:visible').count() == 1, "its pane is gone: the tokens are still reached"


def test_find_goes_through_the_text_across_tokens(page):
    page.fill("#find", "a bc")
    assert page.locator("#hits").inner_text() == "1 of 2"
    page.keyboard.press("Enter")
    assert page.locator("#hits").inner_text() == "2 of 2"
    page.click("#next")
    page.click("#previous")
    assert page.locator("#hits").inner_text() == "2 of 2"
    assert page.locator(".hit").count() == 2 * 2 * 2, "two tokens, twice, in two panes"
    page.fill("#find", "😀")
    assert page.locator("#hits").inner_text() == "1 of 2", "the one that is example_view of bytes, too"
    page.fill("#find", "nowhere")
    assert page.locator("#hits").inner_text() == "none" and page.locator(".hit").count() == 0


def test_rows_are_ordered_by_the_ranking(page, view):
    ranking = view.rank()
    assert "smallest label weight: sft" not in page.locator("#order option").all_inner_texts(), "all labels of sft tie"
    for by, name in [("kd", "smallest label weight: kd"), ("negative_margin", "largest negative margin")]:
        page.select_option("#order", label=name)
        expected = ranking.rows[ranking.rows["by"] == by]["row"].tolist()
        titles = page.locator(".row h2").all_text_contents()  # rows off screen have no inner text
        assert [int(re.match(r"Row (\d+)", title)[1]) for title in titles] == expected
        assert "rank 1 of 3" in titles[0]
        first = ranking.tokens[ranking.tokens["by"] == by].iloc[0]
        page.locator("#least").evaluate("node => { node.open = true; }")
        page.locator("#least button").first.click()
        assert f"row {first['row']}, token {first['position']} of" in page.locator("#detail .where").inner_text()
    page.select_option("#order", label="as given")
    assert page.locator(".row h2").first.text_content().startswith("Row 1 ")


def test_the_theme_can_be_switched(page):
    def paper():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = paper()
    page.click("#theme")
    assert paper() == light and page.locator("#theme").inner_text() == "theme: light"
    page.click("#theme")
    assert paper() != light and page.locator("#theme").inner_text() == "theme: dark"
    page.click("#theme")
    page.emulate_media(color_scheme="dark")
    assert paper() != light and page.locator("#theme").inner_text() == "theme: auto"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_readable(open_page, file, scheme):
    page = open_page(file, color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page.wait_for_selector("html[data-ready]")
    page.fill("#find", "bc")
    page.locator("#least").evaluate("node => { node.open = true; }")
    page.select_option("#left", label="gem")
    for metric in ("label weight", "KL(Q || p)", "negative margin"):
        page.select_option("#metric", label=metric)
        token(page, 2).hover()
        contrasts = worst(page)
        assert contrasts[0][0] >= 4.5, contrasts
    page.emulate_media(media="print")
    contrasts = worst(page)
    assert contrasts[0][0] >= 4.5, contrasts


def test_the_colours_are_told_apart_in_grey(page):
    """From 0 to 1 the ground of a token only grows darker (in the light), by a lot, and negative values are hatched."""
    script = """v => {
      const span = document.querySelector(".t");
      span.style.setProperty("--v", v);
      return getComputedStyle(span).backgroundColor.match(/[\\d.]+/g).slice(-3).map(Number);
    }"""
    grey = [float(np.dot(page.evaluate(script, v), [0.299, 0.587, 0.114])) for v in (0, 0.25, 0.5, 0.75, 1)]
    grey = np.array(grey) / max(grey)
    assert (np.diff(grey) < -0.05).all() and grey[-1] < 0.65
    page.locator(".t").first.evaluate("node => node.classList.add('below')")
    assert "gradient" in page.locator(".t").first.evaluate("node => getComputedStyle(node).backgroundImage")


def test_hostile_tokens_are_escaped(page, view):
    text = page.locator(".row .text").first
    for piece in HOSTILE[:3]:
        assert piece in text.inner_text()
    for piece in HOSTILE[4:]:
        assert piece in page.locator(".row .text").nth(2).text_content()
    for n in range(len(view.summary)):
        token(page, n).hover()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, main b, iframe").count() == 0 and page.locator("script").count() == 2
    message = page.evaluate("document.body.innerText")
    assert "\u202e" not in message and "RLOevil" in message.replace("\n", "")
    assert page.locator("footer li").all_inner_texts()[1] == "left out, no supervised token: row 9"


def test_newlines_bytes_and_directions_are_shown(page):
    text = page.locator(".row .text").first
    assert "⏎\n" in text.evaluate("node => node.textContent")
    assert text.locator(".mark").all_inner_texts() == ["⏎", "RLO", "F0", "9F", "98", "80"]
    assert text.locator(".t", has_text="80").evaluate("node => node.lastChild.data") == "😀", (
        "whole where it is complete"
    )
    assert text.evaluate("node => getComputedStyle(node).unicodeBidi") == "plaintext"
    assert "ZWSP" in page.locator(".row .text").nth(2).text_content()
    token(page, ROWS[0].index(PIECES.index("שלום")) - PROMPT).hover()
    assert "שלום" in page.locator("#detail h2").inner_text()


def test_it_fits_a_phone(open_page, file):
    page = open_page(file, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    token(page, 9).tap()
    page.locator(".pinned").first.wait_for()
    assert page.locator("#detail h2").is_visible() and "token 12 of" in page.locator("#detail .where").inner_text()
    box, sheet = token(page, 9).bounding_box(), page.locator("#detail").bounding_box()
    assert box["y"] + box["height"] <= sheet["y"], "not behind the sheet"
    left, right = (page.locator(".row .pane").nth(side).bounding_box() for side in (0, 1))
    assert left["x"] == right["x"] and left["y"] < right["y"]
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_print_keeps_text_legend_and_the_pinned_token(page):
    token(page, 3).click()
    page.emulate_media(media="print", color_scheme="dark")
    for selector, is_visible in {
        "#controls": False,
        "#theme": False,
        "#legend": True,
        "#detail": True,
        ".text >> nth=0": True,
    }.items():
        assert page.locator(selector).is_visible() == is_visible, selector
    assert page.evaluate("getComputedStyle(document.body).getPropertyValue('print-color-adjust')") == "exact"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
