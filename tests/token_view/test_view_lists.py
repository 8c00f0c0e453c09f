"""Checkpoints, columns of the data, segments and the vocabulary table: their values, and how the page shows them."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from browser import worst
from example_view import SPECS, example_view
from tiny_models import letters, llama

import qlens
from qlens import InputError, Tokens
from qlens.analysis.token_view.page import model_metrics
from qlens.analysis.token_view.segments import patterns, segments_of
from qlens.analysis.token_view.summary import summarise
from qlens.analysis.token_view.vocabulary import VocabularyTotals

ROWS = [
    {"prompt": "what is ban", "completion": "nab", "reward": 0.5, "hardness": [1, 2, 3, 4]},
    {"prompt": "what is gell", "completion": "lleg", "reward": -1},
]


@pytest.fixture(scope="module")
def models():
    return {"model": llama(0), "teacher": llama(1), "tokenizer": letters()}


@pytest.fixture(scope="module")
def trained(models):
    options = {"columns": ["reward", "hardness"], "segments": {"ends": "b.*", "all": "what.*"}, "progress": False}
    return qlens.view(text=ROWS, variants=["sft", "kd"], after=llama(2), top_k_teacher=3, **options, **models)


@pytest.fixture
def page(open_page, tmp_path):
    page = open_page(example_view(training=True).save(tmp_path / "view.html"), viewport={"width": 1280, "height": 900})
    page.wait_for_selector("html[data-ready]")
    return page


def test_totals_of_chunks_are_the_sums_over_all_tokens():
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 7, generator=draw, dtype=torch.float64), torch.arange(40) % 5
    tokens, totals, variant = Tokens(logits=logits, labels=labels), VocabularyTotals(), qlens.get("dft")
    for start in range(0, 40, 9):
        summarise(tokens[start : start + 9], [variant], totals=totals)
    p, hot = torch.softmax(logits, -1).numpy(), np.eye(7)[labels]
    move = p[np.arange(40), labels][:, None] * (hot - p)
    frame = totals.frame()
    expected = {"labels": hot.sum(0), "p": p.sum(0), "q": (p + move).sum(0), "move": move.sum(0)}
    expected |= {"move_label": (move * hot).sum(0), "move_other": (move * (1 - hot)).sum(0)}
    for name, values in expected.items():
        np.testing.assert_allclose(frame[name], values, atol=1e-12, err_msg=name)
    assert totals.tokens == 40


def test_a_vocabulary_table_goes_from_promoted_to_demoted(trained):
    frame = trained.vocabulary
    assert set(frame["method"]) == set(trained.methods) and len(frame) == 3 * llama(0).config.vocab_size
    for name in trained.methods:
        moves = frame.loc[frame["method"] == name, "move"]
        assert moves.is_monotonic_decreasing and abs(moves.sum()) < 1e-4, "Q and p have the same mass"
    sft = frame[frame["method"] == "sft"].set_index("token")
    assert sft.loc["l", "labels"] == 2 and sft.loc["l", "q"] == pytest.approx(2)


def test_a_top_k_teacher_keeps_its_entries_and_the_students_ratios(models):
    tokens = Tokens.from_text(models["model"], models["tokenizer"], ["a word"], teacher=models["teacher"])
    name, whole = "kd, top 3 of teacher", tokens.logits.shape[1]
    summary = summarise(tokens, [qlens.get("sft"), qlens.get("kd")], candidates=whole, top_k_teacher=3)
    assert list(summary.methods) == ["sft", "kd", name], "methods without a teacher are read once"
    p, t = torch.softmax(tokens.logits, -1).numpy(), torch.softmax(tokens.teacher, -1).numpy()
    expected = np.where(t >= np.sort(t, 1)[:, -3:-2], t, 0)
    rest = np.where(expected > 0, 0, p)
    mass = expected.sum(1)
    expected = expected + (1 - mass)[:, None] * rest / rest.sum(1, keepdims=True)
    q = summary.probs + summary.moves[2]
    np.testing.assert_allclose(q, np.take_along_axis(expected, summary.ids.astype(int), 1), atol=1e-5)
    np.testing.assert_allclose(summary.models["teacher_top_mass"], mass, atol=1e-6)
    everything = summarise(tokens, [qlens.get("kd")], top_k_teacher=whole)
    np.testing.assert_allclose(everything.moves[0], everything.moves[1], atol=1e-6)


def test_two_checkpoints_are_read_on_the_same_tokens(trained, models):
    pairs = [(row["prompt"], row["completion"]) for row in ROWS]
    before, after = (Tokens.from_text(model, models["tokenizer"], pairs) for model in (models["model"], llama(2)))
    later = trained.summary.after
    np.testing.assert_allclose(later.models["p_y"], after.label_probs, rtol=1e-4)
    change = (after.probs - before.probs).abs().sum(-1) / 2
    np.testing.assert_allclose(later.models["change"], change, rtol=1e-4)
    assert later.ids.tolist() == trained.summary.ids.tolist(), "the same entries"
    gain = (after.label_log_probs - before.label_log_probs).numpy()
    np.testing.assert_allclose(model_metrics(trained)["gain"], gain, rtol=1e-3, atol=1e-5)
    table = trained.table
    assert len(table) == 2 * 3 * 9 and set(table["checkpoint"]) == {"before", "after"}
    line = table[(table["checkpoint"] == "after") & (table["method"] == "kd")].iloc[0]
    assert line["p_y"] == pytest.approx(after.label_probs[0].item(), rel=1e-4)
    assert torch.is_grad_enabled(), "reading two models leaves the caller's mode"
    model = models["model"].train()
    same = qlens.view(text=ROWS, variants="sft", after=model, **models)
    assert all(module.training for module in model.modules()) and model.eval()
    np.testing.assert_allclose(same.summary.after.models["change"], 0, atol=1e-6)


def test_a_column_may_have_a_value_for_every_token_of_the_row(models):
    row = {**ROWS[0], "place": list(range(17))}
    assert qlens.view(text=row, columns=["place"], **models).columns["place"].tolist() == [13, 14, 15, 16]


def test_columns_of_the_data_stand_beside_the_tokens(trained):
    columns = trained.columns
    assert columns["reward"].tolist() == [0.5] * 4 + [-1.0] * 5
    assert columns["hardness"].tolist()[:4] == [1, 2, 3, 4] and columns["hardness"][4:].isna().all()
    line = trained.table.iloc[1]
    assert (line["reward"], line["hardness"], line["segment"]) == (0.5, 2, "ends")
    few = trained.top(1)
    assert len(few.columns) == len(few.summary)


def test_segments_are_parts_of_the_text():
    strings = ["<think>", "2", "+2", "</think>", "it is", " 4", "<tool_call>", "f()"]
    names = segments_of(strings, [1, 2, 3, 4, 5, 6, 7], patterns(None))
    assert names == ["thinking"] * 3 + ["answer"] * 2 + ["tool call"] * 2, "a call that is cut off counts"
    both = patterns({"first": "ab", "second": "b."})
    assert segments_of(["a", "b", "c", "d"], range(4), both, "other") == ["first", "first", "second", "other"]
    assert segments_of(["\udcf0\udc9f", "x"], [0, 1], patterns({"x": "x"}), "other") == ["other", "x"]


def test_means_over_segments_are_means_of_their_tokens(trained):
    table = trained.table[(trained.table["checkpoint"] == "before")]
    expected = table.groupby(["segment", "method"])[["label_weight", "nll"]].mean()
    means = trained.segments.set_index(["segment", "method"])
    pd.testing.assert_frame_equal(means[["label_weight", "nll"]].sort_index(), expected.sort_index(), check_dtype=False)
    assert means.loc[("ends", "kd"), "tokens"] == 4 and means.loc[("all", "kd"), "tokens"] == 5


def test_mistakes_are_named(models):
    for arguments, message in (
        ({"columns": ["rewards"]}, "columns: no row has 'rewards'; the rows have completion, hardness, prompt, reward"),
        ({"columns": "reward"}, "columns must be a list"),
        ({"columns": ["prompt"]}, "prompt must be a number, or a list of one per token, got 'what is ban'"),
        (
            {"text": [{**ROWS[0], "p": [1, 2]}], "columns": ["p"]},
            "p has 2 values, but the row has 17 tokens, 4 of them",
        ),
        ({"text": [{**ROWS[0], "kl": 1}], "columns": ["kl"]}, "'kl' is a column of the view itself"),
        ({"segments": {"a": "("}}, "segments: 'a' has no regular expression: '('"),
        ({"segments": ["a"]}, "segments must map names to regular expressions"),
        ({"top_k_teacher": 3, "teacher": None, "variants": "sft"}, "top_k_teacher=3 needs a teacher"),
        ({"top_k_teacher": 0}, "top_k_teacher must be a whole number of at least 1, got 0"),
        ({"after": llama(1, vocab=40)}, "after has a vocabulary of 40"),
    ):
        with pytest.raises(InputError) as error_info:
            qlens.view(**({"text": ROWS} | models | arguments))
        assert message in str(error_info.value), arguments
    with pytest.raises(InputError, match="no sums over the vocabulary"):
        example_view().vocabulary  # noqa: B018  the property raises


def test_a_row_is_drawn_as_running_text(trained):
    figure = trained.plot(row=2, metric="label_weight", methods=["sft", "kd"])
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes[:2]]
    assert [words[0] for words in texts] == ["sft", "kd"] and "".join(texts[0][1:]).endswith("gell\u21b5lleg</s>")
    boxes = [ax.patches for ax in figure.axes[:2]]
    assert [len(each) for each in boxes] == [5, 5], "supervised tokens alone are coloured"
    assert boxes[0][0].get_facecolor() != boxes[1][0].get_facecolor()
    assert len(trained.plot(metric="column reward").axes) == 2, "one block and its colour bar"
    for arguments, message in (
        ({"metric": "trust"}, "metric must be one of"),
        ({"methods": ["dft"]}, "none of this view's"),
    ):
        with pytest.raises(InputError, match=message):
            trained.plot(**arguments)


def test_the_page_begins_with_what_is_trained_on(page):
    assert page.locator("#metric").evaluate("node => node.selectedOptions[0].label") == "trained on"
    assert page.locator(".pane:visible").count() == 3, "one pane per row"
    assert "token 3 of 13" in page.locator("#detail .where").inner_text(), "the first supervised token"
    page.locator(".row .c").nth(1).hover()
    assert "token 2 of 13" in page.locator("#detail .where").inner_text()
    assert "not trained on" in page.locator("#detail .where").inner_text()
    assert "reward 2" in page.locator(".row h2").nth(1).text_content()


def test_the_page_flags_labels_that_are_not_the_most_probable(page):
    view = example_view(training=True)
    for n, rank in enumerate(view.summary.models["label_rank"]):
        assert ("miss" in page.locator(f'[data-n="{n}"]').first.get_attribute("class").split()) == (rank > 1)


def test_the_page_shows_a_method_before_and_after(page):
    view = example_view(training=True)
    names = page.locator("#left option").all_inner_texts()
    assert names == [*SPECS, *(f"{spec}, after" for spec in SPECS)]
    page.select_option("#left", label="dft")
    page.select_option("#right", label="dft, after")
    page.locator('[data-n="4"]').first.click()
    row = page.locator("#detail .wide >> nth=0 >> tbody tr >> nth=0 >> td").all_inner_texts()
    label, method = view.summary.models["label"][4], SPECS.index("dft")
    at = view.summary.ids[4].tolist().index(label)
    p, after = view.summary.probs[4, at], view.summary.after.probs[4, at]
    moves = view.summary.moves[method, 4, at], view.summary.after.moves[method, 4, at]
    expected = [p, after, view.summary.teacher[4, at], p + moves[0], moves[0], after + moves[1], moves[1]]
    numbers = [float(x.replace("\N{MINUS SIGN}", "-").replace("+", "")) for x in row[1:]]
    assert numbers == pytest.approx(expected, abs=6e-4)


def test_the_page_lists_vocabulary_and_segments(page):
    view = example_view(training=True)
    page.select_option("#left", label="kd")
    page.locator("#vocabulary summary").click()
    first = page.locator("#vocabulary table").nth(0).locator("tbody tr").nth(0).locator("td").all_inner_texts()
    expected = view.vocabulary.query("method == 'kd'").iloc[0]
    assert int(first[1]) == expected["labels"]
    assert [float(x.replace("+", "").replace("\N{MINUS SIGN}", "-")) for x in first[2:7]] == pytest.approx(
        [expected["p"], expected["q"], expected["move"], expected["move_label"], expected["move_other"]], abs=6e-4
    )
    page.select_option("#metric", label="NLL")
    page.locator("#segments summary").click()
    rows = page.locator("#segments tbody tr").all_inner_texts()
    nll = view.summary.models["nll"].groupby(view.columns["segment"]).mean()
    assert {row.split("\t")[0]: float(row.split("\t")[2]) for row in rows} == pytest.approx(nll.to_dict(), abs=6e-4)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_lists_are_readable(open_page, tmp_path, scheme):
    file = example_view(training=True).save(tmp_path / "view.html")
    page = open_page(file, color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page.wait_for_selector("html[data-ready]")
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    for metric in ("trained on", "label rank", "gain of log p(label)", "reward"):
        page.select_option("#metric", label=metric)
        contrasts = worst(page)
        assert contrasts[0][0] >= 4.5, contrasts
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_the_command_shows_what_is_asked(run, user_files, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    command = ["view", "--model", user_files["model"], "--data", data, "--variants", "dft"]
    code, out, err = run(*command, "--vocabulary", "--top", 2)
    assert code == 0 and "dft promotes most:" in out and "dft demotes most:" in out and "move_other" in out
    assert "columns that are ignored: hardness, reward" in err
    code, out, _ = run(*command, "--vocabulary", "--top", 2, "--json")
    assert code == 0 and [json.loads(line)["move"] > 0 for line in out.splitlines()] == [True, True, False, False]
    code, out, err = run(
        *command, "--figure", "row.pdf", "--row", 2, "--columns", "reward", "--after", user_files["teacher"]
    )
    assert code == 0 and (tmp_path / "row.pdf").read_bytes().startswith(b"%PDF") and "row.pdf" in out
    assert set(pd.read_csv(tmp_path / "row.csv")["row"]) == {2} and "hardness" in err and "reward," not in err
    code, out, _ = run(*command, "--segment", "word=b.*", "--json")
    assert code == 0 and json.loads(out.splitlines()[0])["segment"] == "word"
    teacher = ["--teacher", user_files["teacher"], "--top-k-teacher", 2, "--variants", "kd", "--json"]
    code, out, _ = run(*command, *teacher)
    assert code == 0 and {json.loads(line)["method"] for line in out.splitlines()} == {"kd", "kd, top 2 of teacher"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["row.csv", "row.pdf", "rows.jsonl"], "no page unasked"
    for words, message in (
        (["--row", 1], "--row goes with --figure"),
        (["--segment", "a"], "NAME=REGEX"),
        (["--after", "./nowhere"], "--after: "),
        (["--rank", "--vocabulary"], "--vocabulary is about the view of single tokens"),
    ):
        code, out, err = run(*command, *words)
        assert code == 2 and message in err
