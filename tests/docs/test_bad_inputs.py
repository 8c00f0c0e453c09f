"""Bad inputs are refused: by every verb in one line with exit code 2, in Python by an InputError; nothing is written."""

import math
import shutil

import pytest
import torch
from bad_inputs import ON, commands, places
from example_study import example_study
from tiny_models import letters, llama

import qlens
import qlens.analysis.study.study
from qlens.cli import console
from qlens.cli.app import app

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
    monkeypatch.setattr("qlens.data.chat_templates.limits.SECONDS", 0.3)
    for started in ("run_all", "_prepare"):  # what is accepted by mistake must not train for minutes
        monkeypatch.setattr(f"qlens.analysis.compare.comparison.{started}", None)

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
        wrong = [fault for fault, is_wrong in faults.items() if is_wrong]
        return f"qlens {' '.join(words)[:100]!r}: {'; '.join(wrong)}" if wrong else ""

    return call


def contents(folder):
    """Every file and folder with its size."""
    paths = (path for path in folder.rglob("*") if path.name != "__pycache__" and path.suffix != ".pyc")
    return {path: path.stat().st_size if path.is_file() else None for path in paths}


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_command_line_reports_bad_inputs_in_one_line(refused, kind):
    wrong = [fault for words in COMMANDS[kind] if (fault := refused(*words))]
    assert not wrong, f"{len(wrong)} of {len(COMMANDS[kind])}:\n" + "\n".join(wrong)


def test_bad_inputs_cover_every_verb():
    assert sum(map(len, COMMANDS.values())) >= 150
    verbs = {words[0] for kind in COMMANDS.values() for words in kind}
    assert {"list", "show", "explain", "check", "compare", "view"} <= verbs


Z, Y = torch.zeros(3, 5), torch.tensor([0, 1, 2])
TOKENS = {
    "logits": (None, "x", Z.long(), Z[0], torch.zeros(3, 1), Z * math.nan, Z - math.inf),
    "labels": (None, [0, 1, 2], Y.float(), Y > 0, Y + 9, Y - 1, Y - 100, Y[None], Y[:2]),
    "teacher": ("x", torch.zeros(3, 6), torch.zeros(2, 5), Z * math.nan, Z.long()),
    "weight": ([1, 1, 1], torch.ones(2), torch.tensor([1, math.nan, 1]), torch.tensor([1, -math.inf, 1]), "x"),
    "advantage": (torch.full((3,), math.inf), torch.ones(3, dtype=torch.complex64), torch.ones(3, 1)),
    "sequence": (torch.zeros(3), Y > 0, torch.zeros(4).long(), [0, 0, 1]),
    "pair": (torch.zeros(3), torch.tensor([0.5, 1, 2])),
    "critical": (torch.tensor([0.5, 1, 0]), torch.tensor([2, 1, 0]), [True, False, True]),
    "hint": (torch.full((3,), math.nan),),
    "chosen": (torch.tensor([-1, 1, 1]),),
    "negatives": (torch.full((3, 5), 0.3), torch.ones(3, 4).bool(), Y > 0),
}
FUSED = {
    "chunk": (0, -1, 1.5, "3", True),
    "denominator": (0, -1, math.nan, math.inf, "x", torch.tensor(0.0), torch.ones(3)),
    "labels": (None, Y + 9, Y - 1, Y.float(), Y[None], Y[:2], Y > 0),
    "teacher": (
        None,
        "x",
        torch.zeros(3, 6),
        torch.zeros(2, 5),
        (torch.zeros(3, 2), torch.zeros(6, 2)),
        (torch.zeros(3, 2),),
    ),
    "hidden": (None, torch.zeros(2, 2), torch.zeros(1, 3, 2), torch.zeros(3, 2).long()),
    "head": (None, torch.zeros(5, 3), torch.zeros(5, 2).double()),
    "bias": ([1], torch.zeros(4)),
    "softcap": (0, -1.0, math.nan, "x"),
    "logit_scale": (0, math.nan, "x"),
    "weight": (torch.tensor([1, math.nan, 1]), [1, 1, 1], torch.ones(2)),
    "sequence": (torch.zeros(3),),
    "banana": (Y,),
    "variant": (None, 3, "sftt"),
}
STUDIES = {
    "config.json": (b"[]", b"null", b"{", b'{"methods": {}}', b"\xff", lambda b: b.replace(b'"name"', b'"nome"')),
    "results.csv": (b"", b"a,b\n1,2\n", lambda b: b[: len(b) // 2], lambda b: b[:-9], lambda b: b.replace(b"sft", b"tfs"),
                    lambda b: b.replace(b"score", b"sc"), lambda b: b + b"a,b,c,d,e,f,g\n", b"\xff\xfe", lambda b: b + b[-30:]),
    "diagnostics.csv": (b"", lambda b: b.replace(b"kl_start", b"kl")),
    "rates.csv": (b"setting\n", None),
    "curves.csv": (lambda b: b.replace(b",0,", b",x,"),),
}  # fmt: skip


def accepted(calls):
    """Those of the calls, by name, that do not end in an InputError of a line."""
    wrong = []
    for name, call in calls.items():
        try:
            wrong.append(f"{name} is accepted: {call()!r:.60}")
        except qlens.InputError as error:
            if not str(error).strip() or len(str(error)) > 1200:
                wrong.append(f"{name} is refused by {error!r:.60}")
        except Exception as error:
            wrong.append(f"{name} raises {error!r:.200}")
    return wrong


def test_tokens_refuse_values_that_are_no_tensors():
    def call(name, value):
        return lambda: qlens.Tokens(**{"logits": Z, "labels": Y, name: value})

    assert not accepted({f"{name} {n}": call(name, v) for name, vs in TOKENS.items() for n, v in enumerate(vs)})


def test_fused_loss_refuses_invalid_arguments():
    hidden, head = torch.zeros(3, 2, requires_grad=True), torch.ones(5, 2)

    def call(name, value):
        arguments = {"variant": "kd", "teacher": Z, "hidden": hidden, "head": head, "labels": Y, name: value}
        return lambda: qlens.fused_loss(**arguments)

    assert not accepted({f"{name} {n}": call(name, v) for name, vs in FUSED.items() for n, v in enumerate(vs)})


def test_a_damaged_study_is_refused_and_its_file_named(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    monkeypatch.setattr("qlens.analysis.study.report.panels", lambda study: ())  # figures take time and are not read
    example_study().save(whole)
    assert qlens.analysis.study.Study.load(whole).methods

    def call(file, content):
        def load():
            folder = tmp_path / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            if content is None:
                (folder / file).unlink()
            else:
                before = (folder / file).read_bytes()
                (folder / file).write_bytes(content(before) if callable(content) else content)
            with pytest.raises(qlens.InputError, match=file):
                qlens.analysis.study.Study.load(folder)
            return qlens.analysis.study.Study.load(folder)

        return load

    assert not accepted({f"{file} {n}": call(file, v) for file, vs in STUDIES.items() for n, v in enumerate(vs)})
    folders = (tmp_path / "none", tmp_path, "", "a\0b", "x" * 300, None)
    assert not accepted({repr(each): lambda each=each: qlens.analysis.study.Study.load(each) for each in folders})


def test_python_refuses_what_the_command_line_refuses(work, monkeypatch):
    monkeypatch.chdir(work)
    model, tokenizer, row = llama(), letters(), ("ab", "cd")
    data = {"model": "model", "data": "good.jsonl", "progress": False}
    calls = {
        "no tokenizer": lambda: qlens.Tokens.from_text(model, None, [row]),
        "a tokenizer's name": lambda: qlens.Tokens.from_text(model, "model", [row]),
        "no rows": lambda: qlens.Tokens.from_text(model, tokenizer, []),
        "rows of numbers": lambda: qlens.Tokens.from_text(model, tokenizer, [1, 2]),
        "a teacher that is missing": lambda: qlens.Tokens.from_text(model, tokenizer, [row], teacher="nowhere"),
        "a teacher without a token": lambda: qlens.Tokens.from_text(model, tokenizer, [row], teacher=llama(vocab=7)),
        "view without a tokenizer": lambda: qlens.view(model, None, [row]),
        "view of nothing": lambda: qlens.view(model, tokenizer, []),
        "a folder that is missing": lambda: qlens.Tokens.from_text("nowhere", tokenizer, [row]),
        "view of a folder that is missing": lambda: qlens.view("nowhere", tokenizer, [row]),
        "text of surrogates": lambda: qlens.Tokens.from_text(model, tokenizer, ["a\ud800"]),
        "a token beyond the vocabulary": lambda: qlens.Tokens.from_text(llama(vocab=10), tokenizer, ["abz"]),
        "a number as variants": lambda: qlens.compare(3, **data),
        "numbers as settings": lambda: qlens.compare("sft", settings=[3]),
        "a name that is a number": lambda: qlens.register(3),
        "a head of nothing": lambda: qlens.Head(None, None),
        "ids of no kind": lambda: qlens.TopK(torch.zeros(2, 3), torch.zeros(2, 3)),
        "no loss": lambda: qlens.explain(None),
        "a number": lambda: qlens.check(3),
        "no spec": lambda: qlens.get(None),
        "no variants": lambda: qlens.compare([], **data),
    }
    compared = {
        "seeds": (0, -1, True, "3", None, 1.5, [], [0, 0], [-1], [2**32], [1.5], 10**11),
        "steps": (0, -1, 1.5, "3", True, 10**12),
        "jobs": (0, "3", 1.5),
        "learning_rate": (0, -1.0, math.nan, math.inf, "x", True),
        "out": ("", "a\0b", "x" * 300, 3, "good.py", "/dev/null"),
        "model": (None, "", 3, "no"),
        "data": (None, "no.jsonl", 3),
        "device": (None, 3, "meta"),
        "dtype": (3, "int8", torch.int8),
    }
    for name, values in compared.items():
        for value in values:
            arguments = {**data, name: value}
            calls[f"{name}={value!r}"] = lambda arguments=arguments: qlens.compare(["sft"], **arguments)
    before = contents(work)
    assert not accepted(calls)
    assert contents(work) == before


GOOD = (
    "list", "list --json", "show kd(temperature=2.0)", "show sft --json", "show target_sft --bibtex", "show asft_anchored@v1",
    "show  kd( temperature = 2 )", "show iw_sft(clamp=(0,2))", "show beyond_log_threshold(form='p')", "show good.py:f", "--help",
    "compare --help", "show profit(upper=None)", f"view {ON} --json --variants sft,kd(temperature=2.0) --teacher model",
    f"view {ON} --rank --rows 3 --candidates 99999", f"view {ON} --out good.html", f"view {ON} --dtype bfloat16 --json",
    "view --model model --text ab --json", "view --model ./model --data columns.jsonl --json --variants cft",
    "explain sft --model model --data good.jsonl --rows 2 --json", "explain cft --model model --data columns.jsonl --json",
)  # fmt: skip


def test_good_inputs_keep_working(work, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(work)
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path))  # of the ranking
    row = '{"text": "ab", "id": %d, "critical": [true, false, true], "weight": 0.5}'
    (work / "columns.jsonl").write_text("\n".join(row % n for n in range(3)))
    for line in GOOD:
        code, (out, err) = (
            console.run(app, line.split(" ") if "( " not in line else ["show", line[5:]]),
            capfd.readouterr(),
        )
        assert code == 0 and (out or "good.html" in line), f"{line}: {code}: {err}"
        assert ("id" in err and "ignored" in err) == ("columns" in line), err
    (work / "good.html").unlink()
    (work / "columns.jsonl").unlink()
