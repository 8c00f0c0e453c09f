"""The examples in docstrings run, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import qlens
from qlens.engine.kernels.raw_logits import has_triton
from qlens.registry import Method

MODULES = [module.name for module in pkgutil.walk_packages(qlens.__path__, "qlens.") if "__main__" not in module.name]
if not has_triton():
    MODULES = [name for name in MODULES if not name.endswith("triton_kernels")]
PACKAGES = sorted({".".join(name.split(".")[:3]) if "variants" in name else name.split(".")[1] for name in MODULES})


@pytest.fixture(autouse=True)
def registry_as_it_was():
    before = dict(qlens.registry.registry._METHODS)
    yield
    qlens.registry.registry._METHODS.clear()
    qlens.registry.registry._METHODS.update(before)


class Finder(doctest.DocTestFinder):
    """Also finds the examples of decorated functions, and of functions that registering has turned into a ``Method``."""

    def _from_module(self, module, object):
        return isinstance(object, property) or getattr(object, "__module__", None) == module.__name__

    def of(self, module):
        tests = self.find(module, module=module)
        for name, value in vars(module).items():
            if isinstance(value, Method) and value.fn.__module__ == module.__name__:
                tests += self.find(value.fn, name, module=module, globs=dict(vars(module)))
        return [test for test in tests if test.examples]


@pytest.mark.parametrize("package", PACKAGES)
def test_examples_run(package):
    prefix = package if package.startswith("qlens.") else f"qlens.{package}"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    modules = [name for name in MODULES if name == prefix or name.startswith(f"{prefix}.")]
    failed = []
    for name in modules:
        for test in Finder().of(importlib.import_module(name)):
            if runner.run(test).failed:
                failed.append(test.name)
    assert modules and not failed


def test_examples_of_decorated_functions_are_found():
    for module, names in {
        "variants.likelihood.dft": {"dft"},
        "core.deprecation": {
            "renamed_arguments",
            "without_effect",
            "renamed_value",
            "renamed_attributes",
        },
        "core.deprecation.columns": {"old_columns", "renamed_columns", "current_columns"},
    }.items():
        tests = Finder().of(importlib.import_module(f"qlens.{module}"))
        assert {test.name.removeprefix(f"qlens.{module}.") for test in tests} == names


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
