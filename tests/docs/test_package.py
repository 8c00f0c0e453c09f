"""The distribution: wheel and sdist outside the checkout, layers of imports, generated blocks of the README."""

import ast
import functools
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import warm
from readme import BLOCKS, block, python_blocks

import qlens

ROOT = Path(__file__).parents[2]
LOOK = """import qlens, qlens.analysis.plots, qlens.analysis.token_view.page as page
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


@pytest.fixture(scope="module")
def fresh():
    """Run code in a process that has not imported qlens."""
    with warm.interpreter() as place:
        yield functools.partial(warm.run, place)


def installed_names(fresh, archive, folder):
    """What the registry holds when only the archive's files are there."""
    code, output, errors = fresh(LOOK, folder)
    assert code == 0, errors
    where, names = output.splitlines()
    assert where.startswith(str(folder)), f"{archive}: imported {where} instead"
    return tuple(names.split())


def built_in():
    return tuple(n for n, m in qlens.registry.methods().items() if m.fn.__module__.startswith("qlens.variants"))


def test_wheel_gives_a_full_registry_outside_the_checkout(built, fresh, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert installed_names(fresh, wheel, tmp_path) == built_in()


def test_sdist_gives_a_full_registry_outside_the_checkout(built, fresh, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    subprocess.run(["tar", "-xzf", sdist, "-C", tmp_path], check=True)  # tarfile's filter came with Python 3.11.4
    (folder,) = tmp_path.iterdir()
    assert installed_names(fresh, sdist, folder) == built_in()
    assert {"README.md", "LICENSE", "CITATION.cff", "constraints.txt", "tests"} <= {p.name for p in folder.iterdir()}


def test_a_method_is_in_the_file_of_its_name_in_the_folder_of_its_family():
    for name in built_in():
        method = qlens.registry.methods()[name]
        place = Path(method.where.rpartition(":")[0])
        assert (place.parent.name, place.stem) == (method.family, name)


def test_second_copies_are_refused():
    for name in ("variants", "analysis"):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
        assert f"import qlens.{name}, not {name}" in done.stderr


FLOORS = ("core", "losses", "registry", "lens", "engine", "data", "training", "conformance", "lab", "cli")
DOORS = {
    ("conformance", "analysis"),
    ("core", "data"),
    ("core", "analysis"),
    ("lens", "analysis"),
    ("training", "analysis"),
    ("cli", "analysis"),
}  # Tokens.from_text; plots, those of Target too
HEAVY = {
    "transformers": ("data", "training", "lab"),
    "matplotlib": (),
}  # packages that may be imported at once, not lazily


def package(name):
    """The package of qlens that a module is in: 'core' of 'qlens.core.tokens'; qlens itself is on no floor."""
    return (name.split(".") + ["", ""])[1]


def imports_of(path):
    """(module, whether at module level) of every import in a file that runs; imports for type checkers do not."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    typing = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    unseen = {node for block in typing for node in ast.walk(block)}
    for node in (node for node in ast.walk(tree) if node not in unseen):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from ((name, node in top) for name in names)


def test_dependencies_point_one_way():
    rank = {name: number for number, name in enumerate(FLOORS)} | {"conformance": FLOORS.index("training")}
    for path in (ROOT / "variants").rglob("*.py"):
        imported = {package(name) for name, _ in imports_of(path) if name.startswith("qlens.")}
        assert imported <= {"core", "registry", "variants"}, f"{path.name} imports {imported}"
    for path in (ROOT / "qlens").rglob("*.py"):
        where = path.relative_to(ROOT / "qlens").parts
        if len(where) == 1 or where[0] in ("variants", "analysis"):
            continue
        for name, top in imports_of(path):
            other = package(name)
            if name.startswith("qlens.") and other != where[0]:
                below = other in rank and rank[other] <= rank[where[0]]
                assert below or not top and (where[0], other) in DOORS, f"{'/'.join(where)} imports {name}"
            allowed = HEAVY.get(name.split(".")[0])
            stub = where[:2] == ("losses", "stubs")  # they are what a Trainer needs
            assert allowed is None or not top or where[0] in allowed or stub, f"{'/'.join(where)} imports {name}"


@pytest.mark.parametrize("name", ["compare", "study", "plots", "token_view", "ranking"])
def test_a_package_of_analysis_can_be_the_first_import(name, fresh):
    code, _, errors = fresh(f"import qlens.analysis.{name}", ROOT)
    assert code == 0, errors


def test_importing_and_explaining_are_light():
    heavy = ("transformers", "matplotlib", "joblib", "pandas", "scipy", "trl", "peft", "datasets")
    code = f"""
import sys, qlens, qlens.cli
print([m for m in {heavy} if m in sys.modules])
def loss(logits, labels):
    log_p = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return -(log_p.exp().detach() ** 0.7 * log_p).mean()
print(str(qlens.explain(loss)).count("it grows with p_y"), qlens.check(loss).ok)
print([m for m in ("transformers", "matplotlib", "scipy.stats") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:3] == ["[]", "1 True", "[]"], done.stdout + done.stderr


def readme():
    return (ROOT / "README.md").read_text()


def test_the_readme_gives_the_two_install_commands():
    lines = [line.strip() for line in readme().splitlines()]
    assert "pip install -c constraints.txt -e . && qlens compare" in lines
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in lines
    assert "pip install qlens" not in readme()


def test_the_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {qlens.__version__}\n" in citation


def test_generated_blocks_are_up_to_date():
    for file, blocks in BLOCKS.items():
        for name, write in blocks.items():
            assert block(file.read_text(), name) == write(), (
                f"the block {name!r} is old: run python tests/helpers/readme.py"
            )


def test_the_readme_is_short():
    assert len(readme().splitlines()) <= 250


def test_the_readmes_examples_run(tmp_path):
    before = dict(qlens.registry.registry._METHODS)
    try:
        text = readme() + (ROOT / "variants" / "README.md").read_text()
        for number, example in enumerate(python_blocks(text)):
            file = tmp_path / f"example_{number}.py"
            file.write_text(example)
            runpy.run_path(str(file))
        tokens = qlens.probes()
        trust = qlens.get("sharp_nll").target(tokens).label_weight
        torch.testing.assert_close(trust, tokens.label_probs.sqrt(), rtol=0, atol=1e-6)
    finally:
        qlens.registry.registry._METHODS.clear()
        qlens.registry.registry._METHODS.update(before)
