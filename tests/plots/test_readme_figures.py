"""The figures of the README: one command makes all of them, each with its data."""

import re
from pathlib import Path

import pandas as pd
import pytest

from qlens import InputError
from qlens.analysis.maintenance import readme_figures

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "notebooks" / "figures"


def test_figures_of_a_user_model_come_with_their_data(user_files, tmp_path, capsys):
    words = [f"--{name}={path}" for name, path in user_files.items()]
    only = ("token", "sequence", "plane", "watch")
    readme_figures.main([*words, f"--out={tmp_path / 'made'}", f"--only={','.join(only)}"])
    files = {path.name for path in (tmp_path / "made").iterdir()}
    assert files == {f"{name}.{kind}" for name in only for kind in ("png", "csv")}
    watched = pd.read_csv(tmp_path / "made" / "watch.csv")
    assert set(watched["variant"]) == set(readme_figures.METHODS) and watched["step"].max() == 120
    printed = "".join(capsys.readouterr().err.split())  # lines are wrapped
    for name in only:
        assert "".join(readme_figures.PICTURES[name][1].split()) in printed, name


def test_mistakes_are_named(user_files, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        readme_figures.main(["--out", str(tmp_path), "--model", str(user_files["model"])])
    assert exit_info.value.code == 2 and "go together" in capsys.readouterr().err
    with pytest.raises(InputError, match="no picture is called 'cats'; there are explain, sweep"):
        readme_figures.build(tmp_path / "none", only=["cats"])
    assert not (tmp_path / "none").exists()
    (tmp_path / "one.jsonl").write_text('{"text": "one row"}\n')
    with pytest.raises(SystemExit, match="2 rows or more are needed, .* got 1"):
        readme_figures.main(
            [
                "--model",
                str(user_files["model"]),
                "--teacher",
                str(user_files["teacher"]),
                "--data",
                str(tmp_path / "one.jsonl"),
                "--out",
                str(tmp_path),
            ]
        )


def test_the_stored_figures_are_those_of_the_command():
    stored = {path.stem for path in FIGURES.glob("*.png")}
    assert set(readme_figures.PICTURES) <= stored
    assert all((FIGURES / f"{name}.csv").is_file() for name in readme_figures.PICTURES), "a CSV beside every picture"
    assert sum(path.stat().st_size for path in FIGURES.iterdir()) < 1.5e6


def test_the_figures_of_the_readme_exist():
    pages = [ROOT / "README.md", ROOT / "analysis" / "README.md", ROOT / "analysis" / "results" / "README.md"]
    linked = [page.parent / path for page in pages for path in re.findall(r"\]\(([\w/.-]+\.png)\)", page.read_text())]
    assert linked and all(path.is_file() for path in linked), linked
    assert {path.resolve() for path in FIGURES.glob("*.png")} <= {path.resolve() for path in linked}
