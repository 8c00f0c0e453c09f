"""The examples in docstrings run, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import qlens

MODULES = [module.name for module in pkgutil.walk_packages(qlens.__path__, "qlens.") if "__main__" not in module.name]
PACKAGES = sorted({".".join(name.split(".")[:3]) if "variants" in name else name.split(".")[1] for name in MODULES})


@pytest.fixture(autouse=True)
def registry_as_it_was():
    before = dict(qlens.registry.registry._METHODS)
    yield
    qlens.registry.registry._METHODS.clear()
    qlens.registry.registry._METHODS.update(before)


@pytest.mark.parametrize("package", PACKAGES)
def test_examples_run(package):
    prefix = package if package.startswith("qlens.") else f"qlens.{package}"
    failed, tried = [], 0
    for name in MODULES:
        if name == prefix or name.startswith(f"{prefix}."):
            result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
            failed += [name] * bool(result.failed)
            tried += 1
    assert tried and not failed


def test_public_names_have_a_docstring_and_an_example():
    exceptions = {
        name
        for name in qlens.__all__
        if inspect.isclass(getattr(qlens, name)) and issubclass(getattr(qlens, name), Exception)
    }
    bare = [
        name
        for name in set(qlens.__all__) - exceptions - {"Explanation"}
        if ">>>" not in (getattr(qlens, name).__doc__ or "")
    ]
    assert len(exceptions) == 3 and not bare


def test_every_method_has_a_formula_an_example_and_a_source():
    built_in = {name: method for name, method in qlens.registry.methods().items() if qlens.get(name).built_in}
    assert len(built_in) >= 54
    for name, method in built_in.items():
        assert ".. math::" in method.fn.__doc__ and ">>>" in method.fn.__doc__, name
        assert method.title and method.paper and method.trusted and method.residual, name
