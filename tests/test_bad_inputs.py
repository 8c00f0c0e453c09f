"""Bad input is refused: by every verb in one line with exit code 2, in Python by an InputError; nothing is written."""

import pytest
from bad_inputs import commands, places

from qlens import console
from qlens.cli import app

COMMANDS = commands()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with everything that the inputs name."""
    folder = tmp_path_factory.mktemp("work")
    places(folder)
    return folder


@pytest.fixture
def refused(work, monkeypatch, capfd):
    """Run a command in the folder: what is wrong with how it was refused; nothing where all is right."""
    monkeypatch.chdir(work)
    monkeypatch.setattr("qlens.templates.SECONDS", 0.3)
    for started in ("run_all", "_prepare"):  # what is accepted by mistake must not train for minutes
        monkeypatch.setattr(f"qlens.analysis.compare.{started}", None)

    def call(*words):
        before = contents(work)
        code = console.run(app, words)
        out, err = capfd.readouterr()
        lines = err.splitlines()
        faults = {
            f"exit code {code}": code != 2,
            f"on stdout: {out[:100]!r}": bool(out),
            f"{len(lines)} lines on stderr: {err[-300:]!r}": len(lines) != 1 or not err.startswith("qlens: "),
            f"an unclear line: {err!r}": len(err) < 20 or "Traceback" in err or "Error in" in err,
            f"written: {sorted(contents(work).items() ^ before.items())}": contents(work) != before,
        }
        wrong = [fault for fault, there in faults.items() if there]
        return f"qlens {' '.join(words)[:100]!r}: {'; '.join(wrong)}" if wrong else ""

    return call


def contents(folder):
    """Every file and folder with its size."""
    found = (path for path in folder.rglob("*") if path.name != "__pycache__" and path.suffix != ".pyc")
    return {path: path.stat().st_size if path.is_file() else None for path in found}


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_command_line_refuses_in_one_line(refused, kind):
    wrong = [fault for words in COMMANDS[kind] if (fault := refused(*words))]
    assert not wrong, f"{len(wrong)} of {len(COMMANDS[kind])}:\n" + "\n".join(wrong)


def test_every_verb_is_tried_and_there_are_many_inputs():
    assert sum(map(len, COMMANDS.values())) >= 150
    verbs = {words[0] for kind in COMMANDS.values() for words in kind}
    assert {"list", "show", "explain", "check", "compare", "view"} <= verbs
