"""Whether a process that has imported the libraries may be forked, and if not, why. Called by `fork_server`.

A CUDA context does not survive a fork: torch refuses to use CUDA in a child of a process that has called its driver. A
thread does not survive one either, and a lock that it held stays locked. NVML, which only lists the GPUs, is safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""Lets `torch.cuda.is_available()` ask NVML instead of the CUDA driver."""
_UNSAFE_DEVICE = re.compile(r"/dev/(nvidia-uvm(-tools)?|kfd)")
"""Devices that the drivers of CUDA and ROCm open. NVML opens only /dev/nvidiactl, /dev/nvidiaN and /dev/nvidia-caps."""
_GPU = re.compile(r"nvidia\d+")
_DEVICE_CACHE = re.compile("cuda|gpu|nvml|device|bf16")
_CACHES = ("torch.cuda", "torch.accelerator", "accelerate.utils.imports", "diffusers.utils.torch_utils")
"""Modules that store what they have found out about GPUs."""
_NVML = "libnvidia-ml.so.1"
_MAX_NVML_USERS = 100
_IMPORT_SYSTEM = ("/importlib/", "<frozen ")
_NUM_NAMED = 3
"""Threads, or lines of a stack, that a message names."""


@dataclass
class ImportWatch:
    """Finds the code that makes a fork unsafe during the imports.

    Attributes:
        driver_started_by: the lines of code that have started the CUDA driver, the innermost last; empty if none has.
        module: the first module after whose import the process had a thread or an unsafe device; empty if none.
    """

    driver_started_by: list[str] = field(default_factory=list)
    module: str = ""

    def check(self, module: str) -> None:
        """Check the process after the import of a module."""
        if not self.module and (list_threads() or _unsafe_devices(list_descriptors())):
            self.module = module


@dataclass(frozen=True)
class ForkState:
    """What decides whether a process may be forked.

    Attributes:
        descriptors: the files that it has open.
        threads: descriptions of its threads but the main one.
        is_poisoned: whether torch refuses to use CUDA in its children.
        watch: what was found during the imports.
    """

    descriptors: Sequence[str] = ()
    threads: Sequence[str] = ()
    is_poisoned: bool = False
    watch: ImportWatch = field(default_factory=ImportWatch)

    @classmethod
    def of_this_process(cls, watch: ImportWatch) -> ForkState:
        """Return the state of this process. It forks once, to ask torch in a child."""
        threads = list_threads()
        return cls(list_descriptors(), threads, not threads and is_poisoned(), watch)


def why_unsafe(state: ForkState) -> str | None:
    """Return in one clause why the process must not be forked; None if it may be."""
    devices = _unsafe_devices(state.descriptors)
    reasons = []
    if state.threads:
        number = len(state.threads)
        verb = "the thread {} has started" if number == 1 else f"{number} threads have started: {{}}"
        reasons.append(verb.format(", ".join(state.threads[:_NUM_NAMED])))
    if devices:
        reasons.append(f"{', '.join(devices)} {'is' if len(devices) == 1 else 'are'} open")
    elif state.is_poisoned:
        reasons.append("the CUDA driver has started")
    if not reasons:
        return None
    watch = state.watch
    when = f"after the import of {watch.module} " if watch.module else ""
    lines = " < ".join(reversed(watch.driver_started_by[-_NUM_NAMED:]))
    return when + " and ".join(reasons) + (f"; CUDA was started by {lines}" if lines else "")


def _unsafe_devices(descriptors: Sequence[str]) -> list[str]:
    return sorted({name for name in descriptors if _UNSAFE_DEVICE.fullmatch(name)})


def list_descriptors() -> list[str]:
    """Return the names of the files that this process has open."""
    opened = []
    for path in Path("/proc/self/fd").iterdir():
        # One of them is the descriptor of this listing, which is closed by now.
        with contextlib.suppress(FileNotFoundError):
            opened.append(str(path.readlink()))
    return opened


def list_threads() -> list[str]:
    """Return a description of each thread of this process but the main one: its name, and the code that it runs."""
    known = {thread.native_id: thread for thread in threading.enumerate()}
    found = []
    for path in sorted(Path("/proc/self/task").iterdir()):
        if int(path.name) == os.getpid():
            continue
        # A thread can end at any time.
        with contextlib.suppress(OSError):
            name = (path / "comm").read_text(encoding="utf-8", errors="replace").strip()
            thread = known.get(int(path.name))
            found.append(f"{name} of a native library" if thread is None else _describe(thread))
    return found


def _describe(thread: threading.Thread) -> str:
    target = getattr(thread, "_target", None) or type(thread).run
    return f"{thread.name} of {getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', '?')}"


def is_poisoned() -> bool:
    """Return whether torch refuses to use CUDA in the children of this process: ask it in a child."""
    import torch  # noqa: PLC0415  already imported by the caller's preload

    child = os.fork()
    if child == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) != 0


@contextlib.contextmanager
def without_cuda_driver(watch: ImportWatch) -> Iterator[None]:
    """Keep the libraries that are imported in this block from starting the CUDA driver.

    diffusers asks during its import whether there is a GPU. NVML answers; where it cannot (MIG), the device files do.
    A library that starts the driver nevertheless is recorded.
    """
    import torch  # noqa: PLC0415  the first of the slow imports

    before = os.environ.get(NVML_CHECK)
    natives: dict[str, Callable[..., Any]] = {}

    def init(*args: Any) -> Any:
        watch.driver_started_by.extend(_stack())
        return natives["_cuda_init"](*args)

    replacements: dict[str, Callable[..., Any]] = {"_cuda_getDeviceCount": count_gpus, "_cuda_init": init}
    os.environ[NVML_CHECK] = "1"
    # A build of torch without CUDA has neither.
    for name in filter(partial(hasattr, torch._C), replacements):
        natives[name] = getattr(torch._C, name)
        setattr(torch._C, name, replacements[name])
    try:
        yield
    finally:
        for name, native in natives.items():
            setattr(torch._C, name, native)
        close_nvml(Path("/proc/self/maps").read_text(encoding="utf-8"))
        os.environ.pop(NVML_CHECK)
        if before is not None:
            os.environ[NVML_CHECK] = before


def close_nvml(maps: str, load: Callable[[str], Any] = ctypes.CDLL) -> None:
    """Close NVML if it is loaded, so that each rank opens it itself.

    Args:
        maps: the files that are mapped into this process.
        load: returns a shared library.
    """
    # The file has the version of the driver in its name.
    if _NVML.removesuffix("1") not in maps:
        return
    with contextlib.suppress(OSError, AttributeError):
        shut_down = load(_NVML).nvmlShutdown
        # NVML counts how often it was opened. Any other code than 0 means that it is closed.
        for _ in range(_MAX_NVML_USERS):
            if shut_down() != 0:
                break


def count_gpus(devices: Path = Path("/dev")) -> int:
    """Return the number of GPUs that have a device file."""
    return sum(1 for path in devices.iterdir() if _GPU.fullmatch(path.name))


def _stack() -> list[str]:
    frames = traceback.extract_stack()[:-2]
    return [
        f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
        for frame in frames
        if not any(part in frame.filename for part in _IMPORT_SYSTEM)
    ]


def forget_devices() -> None:
    """In a forked rank: forget what the libraries have found out about GPUs. Its environment may select others."""
    for name in filter(sys.modules.__contains__, _CACHES):
        module = vars(sys.modules[name])
        if "_cached_device_count" in module:
            module["_cached_device_count"] = None
        classes = [vars(each) for each in module.values() if isinstance(each, type) and each.__module__ == name]
        for owner in (module, *classes):
            _clear_caches(owner)


def _clear_caches(owner: Mapping[str, Any]) -> None:
    for name, value in list(owner.items()):
        function = value.__func__ if isinstance(value, staticmethod) else value
        clear = getattr(function, "cache_clear", None)
        if callable(clear) and _DEVICE_CACHE.search(name):
            clear()
