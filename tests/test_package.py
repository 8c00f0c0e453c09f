"""The distribution: what pip installs outside the checkout, and how the house hangs together."""

import ast
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from readme import block, generated, python_blocks

import qlens

ROOT = Path(__file__).parent.parent
LOOK = """import qlens, qlens.analysis.plots, qlens.analysis.page as page
assert all((page.HERE / part).is_file() for part in (page.TEMPLATE, *page.STYLE, *page.SCRIPT)), "parts of the page are left out"
print(qlens.__file__); print(' '.join(qlens.names()))"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel made from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def installed_names(archive, folder):
    """What the registry holds when only the archive's files are there."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {LOOK}"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    where, names = done.stdout.splitlines()
    assert where.startswith(str(folder)), f"{archive}: imported {where} instead"
    return tuple(names.split())


def built_in():
    return tuple(n for n, m in qlens.registry.methods().items() if m.fn.__module__.startswith("qlens.variants"))


def test_wheel_gives_a_full_registry_outside_the_checkout(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert installed_names(wheel, tmp_path) == built_in()


def test_sdist_gives_a_full_registry_outside_the_checkout(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    subprocess.run(["tar", "-xzf", sdist, "-C", tmp_path], check=True)  # tarfile's filter came with Python 3.11.4
    (folder,) = tmp_path.iterdir()
    assert installed_names(sdist, folder) == built_in()
    assert {"README.md", "LICENSE", "CITATION.cff", "constraints.txt", "tests"} <= {p.name for p in folder.iterdir()}


def test_every_variant_file_registers_something():
    used = {Path(m.where.rpartition(":")[0]).name for m in qlens.registry.methods().values()}
    files = {path.name for path in (ROOT / "variants").glob("*.py")} - {"__init__.py"}
    assert files <= used


def test_second_copies_are_refused():
    for name in ("variants", "analysis"):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
        assert f"import qlens.{name}, not {name}" in done.stderr


def imports_of(path):
    """(module, whether at module level) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from ((name, node in top) for name in names)


def test_dependencies_point_one_way():
    for path in (ROOT / "variants").glob("*.py"):
        allowed = {f"qlens.{name}" for name in ("registry", "target", "tokens", "params", "groups", "pairs", "errors")}
        allowed |= {"qlens.citations", "qlens.draws", "qlens.structure"}
        used = {name for name, _ in imports_of(path) if name.startswith("qlens")}
        used = {name for name in used if not name.startswith("qlens.variants.")}
        assert used <= allowed, f"{path.name} imports {used - allowed}"
    for path in (p for p in (ROOT / "qlens").rglob("*.py") if not {"variants", "analysis"} & set(p.parts)):
        at_top = {name for name, top in imports_of(path) if top}
        assert not any(name.startswith(("qlens.analysis", "matplotlib")) for name in at_top), path.name
        if not (
            path.parent.name == "lab"
            or path.name
            in (
                "training.py",
                "fitting.py",
                "learned.py",
                "sources.py",
                "templates.py",
                "vocabularies.py",
                "trainers.py",
                "data.py",
                "reading.py",
                "feeding.py",
                "checkpoints.py",
                "updates.py",
                "measurements.py",
                "stub.py",
                "watch.py",
            )
        ):
            assert not any(name.startswith("transformers") for name in at_top), path.name


def test_importing_qlens_is_light():
    code = "import sys, qlens; print([m for m in ('transformers', 'matplotlib', 'joblib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def readme():
    return (ROOT / "README.md").read_text()


def test_the_readme_gives_the_two_commands_and_names_no_taken_package():
    lines = [line.strip() for line in readme().splitlines()]
    assert "pip install -c constraints.txt -e . && qlens compare" in lines
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in lines
    assert "pip install qlens" not in readme()


def test_the_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {qlens.__version__}\n" in citation


def test_the_readmes_printed_output_is_what_is_printed():
    text = readme()
    for name, made in generated(text).items():
        assert block(text, name) == made, f"the block {name!r} is old: run python tests/readme.py"


def test_the_readmes_examples_run(tmp_path):
    before = dict(qlens.registry._METHODS)
    try:
        for number, example in enumerate(python_blocks(readme())):
            file = tmp_path / f"example_{number}.py"
            file.write_text(example)
            runpy.run_path(str(file))
        tokens = qlens.probes()
        trust = qlens.get("sharp_nll").target(tokens).effective_trust
        torch.testing.assert_close(trust, tokens.label_probs.sqrt(), rtol=0, atol=1e-6)
    finally:
        qlens.registry._METHODS.clear()
        qlens.registry._METHODS.update(before)
