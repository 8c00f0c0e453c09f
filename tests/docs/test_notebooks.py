"""The notebooks run from end to end, and their stored outputs are those of their cells."""

import copy
import re
from pathlib import Path

import nbformat
import pytest
import warm

from qlens import InputError
from qlens.analysis.maintenance import run_notebooks

FOLDER = Path(__file__).parents[2] / "notebooks"
FILES = run_notebooks.notebooks(FOLDER)
PICTURES = {1: 1, 2: 5, 3: 2, 4: 2, 5: 3, 6: 5}  # at least so many are promised
SLIDERS = {2: 0.9, 6: 1.0}  # the notebooks with a slider, and where a test moves it
SIZE = 3e6  # bytes of all six
JUNK = re.compile(
    r"(/home/|/root/|/tmp/|/work/|/usr/|\\Users\\|Warning|\d+%\||it/s\]|<Figure size \d+x\d+ at|0x[0-9a-f]{8})"
)


def number(path):
    return int(path.name.partition("-")[0])


def read(path):
    return nbformat.read(path, 4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def pictures(notebook):
    return [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]


def shown_text(notebook):
    """All text that is shown."""
    data = [output.get("data", {}) for output in outputs(notebook)]
    texts = [text for each in data for kind, text in each.items() if kind.startswith("text/")]
    return "\n".join([*texts, *(output.text for output in outputs(notebook) if output.output_type == "stream")])


def troubles(notebook):
    """Errors, and whatever was said on stderr: warnings and progress bars."""
    return [output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"]


def result(notebook):
    """The sentence at the end: of the last cell that puts something out."""
    return code(notebook)[-1].outputs[-1].data["text/markdown"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Cache folder of the lab, built once for all notebooks."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The name of a kernel that starts in a process with torch and transformers imported, and qlens not."""
    folder = tmp_path_factory.mktemp("jupyter")
    with warm.interpreter("ipykernel.kernelapp", "ipywidgets") as place, pytest.MonkeyPatch.context() as patch:
        warm.kernel(place, FOLDER.parent, folder)
        patch.setenv("JUPYTER_PATH", str(folder))
        yield "warm"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_notebook_runs_and_writes_only_its_run_folder(path, tmp_path, cache, kernel):
    notebook, place = read(path), tmp_path / "here"
    place.mkdir()
    at, before = SLIDERS.get(number(path)), {file.name for file in FOLDER.iterdir()}
    if at is not None:
        notebook.cells += [nbformat.v4.new_code_cell(code) for code in (f"slider.value = {at}", f"display(draw({at}))")]
    kernel = "python3" if number(path) == 1 else kernel  # one in a process of its own from the start
    executed = run_notebooks.run(notebook, place, cache, "small", kernel)
    assert [cell.source for cell in executed.cells] == [cell.source for cell in notebook.cells]
    assert troubles(executed) == []
    assert len(pictures(executed)) >= PICTURES[number(path)]
    assert {file.name for file in FOLDER.iterdir()} == before and {file.name for file in place.iterdir()} <= {"runs"}
    if at is not None:
        images = pictures(executed)
        assert images.count(images[-1]) == 2, "the slider redraws its picture in place"
        del executed.cells[-2:]
    assert "**Result.**" in result(executed)


def test_the_view_notebook_takes_user_models_and_text(user_files, tmp_path, cache, kernel, monkeypatch):
    for name, path in user_files.items():
        monkeypatch.setenv(f"QLENS_{name.upper()}", str(path))
    executed = run_notebooks.run(read(FILES[3]), tmp_path, cache, "small", kernel)
    assert troubles(executed) == [] and list(tmp_path.iterdir()) == []
    assert "On 18 tokens of 4 rows of the second part" in result(executed)
    assert "<TokenView of 18 tokens in 4 rows: sft, dft, target_sft>" in shown_text(executed)


def test_the_training_notebook_takes_user_models_and_rows(user_files, tmp_path, cache, kernel, monkeypatch):
    for name, path in user_files.items():
        monkeypatch.setenv(f"QLENS_{name.upper()}", str(path))
    executed = run_notebooks.run(read(FILES[4]), tmp_path, cache, "small", kernel)
    assert troubles(executed) == []
    assert "41 examples of 41 rows" in shown_text(executed) and "⟦" in shown_text(executed)
    assert "asft_anchored" in shown_text(executed)


def test_stored_outputs_are_up_to_date():
    for path in FILES:
        notebook = read(path)
        nbformat.validate(notebook)
        assert run_notebooks.current(notebook), f"{path.name}: run python -m qlens.analysis.maintenance.run_notebooks"
        stored_text = nbformat.writes(run_notebooks.stored(copy.deepcopy(notebook))) + "\n"
        assert path.read_text(encoding="utf-8") == stored_text, path.name
        assert troubles(notebook) == [], path.name
        assert len(pictures(notebook)) >= PICTURES[number(path)], path.name
        assert not JUNK.search(shown_text(notebook)), (path.name, JUNK.search(shown_text(notebook)))


def test_a_notebook_has_an_introduction_and_a_result():
    for path in FILES:
        notebook = read(path)
        first = notebook.cells[0].source
        assert first.startswith(f"# {number(path)}. ") and "At the end" in first, path.name
        assert result(notebook).startswith("**Result.**") and re.search(r"\d", result(notebook)), path.name
        assert max(len(cell.source.splitlines()) for cell in code(notebook)) <= 45, f"{path.name}: cells are short"
        assert not re.search(r"https?://(?!arxiv\.org)", "".join(cell.source for cell in notebook.cells)), path.name


def test_there_are_six_small_notebooks():
    assert [number(path) for path in FILES] == [1, 2, 3, 4, 5, 6]
    assert sum(path.stat().st_size for path in FILES) < SIZE


def test_the_readme_lists_the_notebooks():
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"](notebooks/{path.name})" in text for path in FILES)


def test_a_changed_cell_is_detected():
    for change in ("source", "count", "order"):
        notebook = read(FILES[1])
        if change == "source":
            notebook.cells[-1].source += " "
        elif change == "count":
            code(notebook)[0].execution_count = 2
        else:
            notebook.cells[0], notebook.cells[1] = notebook.cells[1], notebook.cells[0]
        assert not run_notebooks.current(notebook), change


def test_one_command_runs_and_stores_the_notebooks(tmp_path, capsys):
    cells = [
        nbformat.v4.new_code_cell("print(6 * 7)"),
        nbformat.v4.new_code_cell("import ipywidgets; ipywidgets.IntSlider()"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "7-short.ipynb")
    run_notebooks.main(["--folder", str(tmp_path), "--only", "7"])
    executed = read(tmp_path / "7-short.ipynb")
    assert run_notebooks.current(executed) and shown_text(executed) == "42\n" and "widgets" not in executed.metadata
    assert "7-short.ipynb: " in capsys.readouterr().err.replace("\n", "")
    with pytest.raises(SystemExit, match="holds no numbered notebook"):
        run_notebooks.main(["--folder", str(tmp_path / "none")])
    with pytest.raises(InputError, match="holds no numbered notebook"):
        run_notebooks.notebooks(tmp_path / "none")
