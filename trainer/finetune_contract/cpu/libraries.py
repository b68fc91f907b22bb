"""Libraries that are loaded before all others in the processes of the ranks: Intel's OpenMP runtime, an allocator."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_contract.cpu.spec import Allocator

OPENMP = "libiomp5.so"
NAMES = {
    Allocator.TCMALLOC: ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libtcmalloc.so"),
    Allocator.JEMALLOC: ("libjemalloc.so.2", "libjemalloc.so"),
}
"""File names of each allocator, by preference."""
SYSTEM_FOLDERS = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/opt/*/lib")


class MissingAllocatorError(ValueError):
    """The requested allocator is not installed. The message names the field and the remedy."""


@dataclass(frozen=True)
class Preload:
    """Libraries to load first."""

    libraries: tuple[str, ...]
    """Paths, for LD_PRELOAD."""
    reason: str
    """What was chosen and why; for the log."""
    has_openmp: bool = False
    """Whether Intel's OpenMP runtime is one of them."""

    def variable(self, before: str = "") -> str:
        """Return the value of LD_PRELOAD: these libraries, then those that it has contained before."""
        own = [path for path in before.replace(":", " ").split() if path not in self.libraries]
        return ":".join([*self.libraries, *own])


def choose_preload(allocator: Allocator, folders: Iterable[Path] | None = None, before: str = "") -> Preload:
    """Return the libraries of this image for the requested allocator.

    Args:
        allocator: the request.
        folders: folders with libraries, by preference; None: those of this Python and of the system.
        before: value of LD_PRELOAD that the user has set. An allocator in it is kept.

    Raises:
        MissingAllocatorError: the image lacks the allocator.
    """
    folders = list(library_folders() if folders is None else folders)
    openmp = _find((OPENMP,), folders)
    given = next((kind for kind, names in NAMES.items() if any(Path(p).name in names for p in before.split(":"))), None)
    if given is not None:
        path, why = None, f"{given.value}, because LD_PRELOAD contains it"
    elif allocator is Allocator.AUTO:
        found = [(kind, path) for kind, names in NAMES.items() if (path := _find(names, folders))]
        path = found[0][1] if found else None
        why = f"{found[0][0].value}, because the image has it" if found else "glibc, because the image has no other"
    elif allocator is Allocator.GLIBC:
        path, why = None, "glibc, because the job requests it"
    else:
        path, why = _find(NAMES[allocator], folders), f"{allocator.value}, because the job requests it"
        if path is None:
            raise MissingAllocatorError(
                f"topology.cpu.allocator: {allocator.value} is not installed here; install the library "
                f"{NAMES[allocator][0]} in the image, or write allocator: auto"
            )
    libraries = tuple(str(each) for each in (openmp, path) if each is not None)
    return Preload(libraries, f"allocator {why}", has_openmp=openmp is not None)


def library_folders() -> Sequence[Path]:
    """Return the folders with the libraries of this Python's packages and of the system."""
    system = (path for pattern in SYSTEM_FOLDERS for path in sorted(Path("/").glob(pattern.lstrip("/"))))
    return [Path(sys.prefix) / "lib", *system]


def provider_folders() -> Sequence[Path]:
    """Return the folders in which packages of this Python have libfabric's providers."""
    base = Path(sys.prefix)
    patterns = (
        "lib",
        "opt/mpi/libfabric/lib/prov",
        "lib/python3*/site-packages/oneccl_bindings_for_pytorch/opt/mpi/libfabric/lib/prov",
        "lib/python3*/site-packages/oneccl_bindings_for_pytorch/lib/prov",
    )
    return [path for pattern in patterns for path in sorted(base.glob(pattern))]


def _find(names: Iterable[str], folders: Iterable[Path]) -> Path | None:
    return next((path for name in names for folder in folders if (path := folder / name).is_file()), None)
