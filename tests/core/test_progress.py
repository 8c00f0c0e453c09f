"""Progress: what lines of a log say, and bars of any number of steps."""

import pytest

from qlens.core import progress


def test_neither_rate_nor_time_left_counts_what_was_done_before(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.bar(100, "Rank", "rows", done=60) as advance:
        now[0] = 5.0
        advance()
        assert not capsys.readouterr().err, "no line yet"
        now[0] = 40.0
        advance(19)
        assert capsys.readouterr().err == "Rank: 80 of 100 after 0:40, 0.50 rows/s, about 0:40 left\n"
        advance(20)
    assert capsys.readouterr().err == "Rank: 100 of 100 after 0:40, 1.00 rows/s\n"


def test_items_pass_through(capsys):
    assert list(progress.track("ab", 2, "Read")) == ["a", "b"]
    assert capsys.readouterr().err == "Read: 2 of 2 after 0:00\n"
    assert list(progress.track("ab", 2, "Read", progress=False)) == ["a", "b"] and not capsys.readouterr().err


@pytest.mark.parametrize("unit", ["", "rows"])
def test_a_terminal_shows_a_bar(unit, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress.bar(4, "Rank", unit, done=2) as advance:
        advance(2)
    err = capsys.readouterr().err
    assert "4/4" in err and "Rank" in err
