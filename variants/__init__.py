"""The methods, a file per idea: every file here registers what it holds, and nothing else needs editing."""

import importlib
import pkgutil

if __name__ != "qlens.variants":
    raise ImportError("import qlens.variants, not variants: a second copy would register every method twice")

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
