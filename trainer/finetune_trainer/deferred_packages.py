"""Packages that are imported only for one of their modules: their own code runs when one of their names is used.

diffusers keeps each kind of model in a package that imports all models of that kind whenever one of them is imported. A
run needs one or two of them. The import of a module of a deferred package finds the package, but does not run it. The
first access to a name that the package does not have yet runs it as usual.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PACKAGES = frozenset(f"diffusers.models.{kind}" for kind in ("autoencoders", "controlnets", "transformers", "unets"))


class _DeferredLoader(importlib.abc.Loader):
    """Creates a package without running its code."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Return what the package's own loader creates."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Let the first access to a missing name run the package."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader

        def run_package(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            del module.__dict__["__getattr__"]
            self._loader.exec_module(module)
            return getattr(module, name)

        module.__dict__["__getattr__"] = run_package


class _DeferringFinder(importlib.abc.MetaPathFinder):
    """Finds the deferred packages."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a deferred package; None for everything else."""
        if fullname not in PACKAGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeferredLoader(spec.loader)
        return spec


def defer() -> None:
    """Defer the packages from now on. Those that are already imported stay as they are."""
    if not any(isinstance(finder, _DeferringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeferringFinder())
