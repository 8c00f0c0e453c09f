"""The examples in docstrings run, and every public name has one."""

import doctest
import importlib
import pkgutil

import pytest

import qlens

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(qlens.__path__, "qlens.") if not module.name.endswith("__main__")
)


@pytest.fixture(autouse=True)
def registry_as_it_was():
    before = dict(qlens.registry.registry._METHODS)
    yield
    qlens.registry.registry._METHODS.clear()
    qlens.registry.registry._METHODS.update(before)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", [n for n in qlens.__all__ if n not in ("InputError", "ParameterError", "UnknownName")])
def test_public_names_have_a_docstring_and_an_example(name):
    described = getattr(qlens, name).__doc__
    assert described and (">>>" in described or name == "Explanation"), name


def test_every_method_has_a_formula_an_example_and_a_source():
    for name, method in qlens.registry.methods().items():
        if method.fn.__module__.startswith("qlens.variants"):
            assert ".. math::" in method.fn.__doc__ and ">>>" in method.fn.__doc__, name
            assert method.title and method.paper and method.trusted and method.residual, name
