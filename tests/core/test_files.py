"""Atomic writes, paths that cannot be used, and one-line error messages of the command line."""

import errno
import resource
import threading

import pandas as pd
import pytest
import typer
from matplotlib.figure import Figure

from qlens.analysis.plots.save import save_figure
from qlens.cli import console
from qlens.core.errors import InputError, one_line
from qlens.core.files import make_folder, output_file, read_json, user_path, write_json, write_text, written


def test_threads_may_write_one_file_at_a_time(tmp_path):
    texts = [letter * 10_000 for letter in "abcdefgh"]
    barrier = threading.Barrier(len(texts))

    def write(text):
        barrier.wait()
        with written(tmp_path / "file") as partial:
            partial.write_text(text[:5000])
            barrier.wait()  # all of them are half-way
            partial.write_text(text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in texts and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def small_disk():
    """Files of at most 1,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_leaves_no_file(tmp_path, small_disk):
    write_text(tmp_path / "old", "old")
    with pytest.raises(InputError, match="'.*old' cannot be written: the file would be larger than files may be here"):
        write_text(tmp_path / "old", "x" * 2000)
    with pytest.raises(InputError, match="cannot be written"):
        save_figure(Figure(), tmp_path / "figure.png", {"": pd.DataFrame({"a": range(10)})})
    assert (tmp_path / "old").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["old"]


def test_paths_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, say in {
        "": "must be a path",
        "a\0b": "NUL",
        "x" * 300: "too long",
        "~no_such_user": "is no path",
    }.items():
        with pytest.raises(InputError, match=f"out .*{say}|out must"):
            user_path(name, "out")
    for path, say in (("folder", "is a folder"), ("no/file", "there is no folder"), ("file/a", "there is no folder")):
        with pytest.raises(InputError, match=say):
            output_file(tmp_path / path, "out")
    with pytest.raises(InputError, match="it is a file, not a folder"):
        make_folder(tmp_path / "file")
    with pytest.raises(InputError, match="a part of the path is a file"):
        write_json(tmp_path / "file" / "a.json", {})
    (tmp_path / "cut.json").write_text('{"a": ')
    for path, say in (("cut.json", "is damaged"), ("folder", "it is a folder"), ("none.json", "missing")):
        with pytest.raises(InputError, match=say):
            read_json(tmp_path / path)


def test_a_message_is_one_line_of_what_can_be_printed():
    assert one_line("a\n\n b\x1b[31m \ud800 é") == "a b\\x1b[31m \\ud800 é"
    assert len(one_line("x" * 10**6)) == 1000


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (InputError("two\nlines"), 2, "qlens: two lines\n"),
        (SystemExit(0), 2, "ended the program by sys.exit(0)"),
        (SystemExit("bye"), 2, "sys.exit('bye')"),
        (OSError(errno.ENOSPC, "No space left on device", "a.csv"), 2, "a.csv: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("division by zero"), 3, "ZeroDivisionError in test_files.py, line "),
        (type("Panic", (BaseException,), {})("rust"), 3, "QLENS_TRACEBACK=1 shows the traceback"),
    ],
    ids=str,
)
def test_every_error_is_one_line_and_its_exit_code(monkeypatch, capsys, raised, code, says):
    app = typer.Typer()

    @app.command()
    def verb():
        raise raised

    assert console.run(app, ["--help"]) == 0 and "Usage" in capsys.readouterr().out
    app.command("other")(lambda: None)
    assert console.run(app, ["verb"]) == code
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1 and err.startswith("qlens: ")
    monkeypatch.setenv("QLENS_TRACEBACK", "1")
    assert console.run(app, ["verb"]) == code
    assert type(raised).__name__ in capsys.readouterr().err


def test_a_closed_output_ends_a_command_without_a_message(capsys):
    app = typer.Typer()

    @app.command()
    def verb():
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # as rich does # noqa: B904

    app.command("other")(lambda: None)
    assert console.run(app, ["verb"]) == 1 and capsys.readouterr().err == ""
