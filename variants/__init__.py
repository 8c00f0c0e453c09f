"""The methods, a file each in the folder of its family: every file registers its method, and nothing else needs editing."""

import importlib
import pkgutil

if __name__ != "qlens.variants":
    raise ImportError("import qlens.variants, not variants: a second copy would register every method twice")

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
