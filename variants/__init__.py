"""The methods: one file each, in the folder of its family. Every file registers its method at import."""

import importlib
import pkgutil

if __name__ != "qlens.variants":
    raise ImportError("import qlens.variants, not variants: a second copy would register every method twice")

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
