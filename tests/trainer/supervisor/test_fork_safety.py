"""Which processes may be forked: the decision, and what real imports do. A GPU is replaced by stand-ins."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from finetune_trainer.supervisor import fork_safety
from finetune_trainer.supervisor.fork_safety import ForkState, ImportWatch, why_unsafe

NVML = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap1")
DRIVER = (*NVML, "/dev/nvidia-uvm")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (ForkState(), None),
        (ForkState(("/dev/null", "socket:[1]")), None),
        (ForkState(NVML), None),
        (ForkState(DRIVER, is_poisoned=True), "/dev/nvidia-uvm is open"),
        (ForkState(("/dev/kfd", *DRIVER)), "/dev/kfd, /dev/nvidia-uvm are open"),
        (ForkState(NVML, is_poisoned=True), "the CUDA driver has started"),
        (ForkState(threads=("cuda-EvtHandlr of a native library",)), "the thread cuda-EvtHandlr of a native library"),
        (ForkState(threads=("a", "b", "c", "d")), "4 threads have started: a, b, c"),
        (ForkState(DRIVER, watch=ImportWatch(module="peft.utils")), "after the import of peft.utils /dev/nvidia-uvm"),
        (
            ForkState(DRIVER, watch=ImportWatch(["outer.py:1", "inner.py:2"])),
            "; CUDA was started by inner.py:2 < outer.py:1",
        ),
    ],
)
def test_reasons(state: ForkState, reason: str | None) -> None:
    found = why_unsafe(state)
    assert found == reason if reason is None else found is not None and reason in found


def test_threads_are_named_with_their_code() -> None:
    release = threading.Event()

    def wait_for_the_end() -> None:
        release.wait()

    thread = threading.Thread(target=wait_for_the_end, name="poller")
    thread.start()
    try:
        found = [each for each in fork_safety.list_threads() if each.startswith("poller of ")]
    finally:
        release.set()
        thread.join()
    assert len(found) == 1
    assert found[0].endswith("test_threads_are_named_with_their_code.<locals>.wait_for_the_end")


def test_gpus_are_counted_by_their_device_files(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert fork_safety.count_gpus(tmp_path) == 2


class StandInNvml:
    """A stand-in for NVML that was opened twice."""

    def __init__(self) -> None:
        self.uses = 2

    def nvmlShutdown(self) -> int:  # noqa: N802  NVML's name
        self.uses -= 1
        return 0 if self.uses >= 0 else 1


def test_nvml_is_closed_as_often_as_it_was_opened() -> None:
    nvml = StandInNvml()
    fork_safety.close_nvml("7f00 r-xp /usr/lib/libc.so.6", lambda _: nvml)
    assert nvml.uses == 2
    fork_safety.close_nvml("7f00 r-xp /usr/lib/libnvidia-ml.so.580.65.06", lambda _: nvml)
    assert nvml.uses == -1
    fork_safety.close_nvml("libnvidia-ml.so.1", lambda _: object())


IMPORTS = """
import os, sys, torch
from finetune_trainer import libraries
from finetune_trainer.supervisor import fork_safety

# Stand-ins for a machine with a GPU: a driver that opens a file, and a device file.
opened = []
def start_driver(*args):
    opened.append(args)
    return 1
native = getattr(torch._C, "_cuda_getDeviceCount", None)
torch._C._cuda_getDeviceCount = start_driver
torch._C._cuda_init = start_driver
torch.cuda._is_compiled = lambda: True
fork_safety.count_gpus = lambda: 1
torch.cuda._device_count_nvml = lambda: NUM_LISTED
watch = fork_safety.ImportWatch()
with fork_safety.without_cuda_driver(watch):
    libraries.preload(watch.check)
    EXTRA
assert torch._C._cuda_getDeviceCount is start_driver
assert fork_safety.NVML_CHECK not in os.environ
from diffusers.utils.torch_utils import TorchDeviceBackend
print(len(opened), TorchDeviceBackend._detect_device_type(), fork_safety.list_threads())
print(fork_safety.why_unsafe(fork_safety.ForkState.of_this_process(watch)))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch._C._cuda_getDeviceCount = lambda: 0
fork_safety.forget_devices()
print(TorchDeviceBackend._detect_device_type())
"""


def run_imports(num_listed_by_nvml: int, extra: str = "pass") -> list[str]:
    """Import the trainer's libraries in a process with stand-ins for a GPU, and return its output."""
    source = IMPORTS.replace("NUM_LISTED", str(num_listed_by_nvml)).replace("EXTRA", extra)
    done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.mark.trainer
def test_the_imports_see_the_gpu_without_starting_its_driver() -> None:
    """diffusers asks for the device during its import; a rank forgets the answer when it has been forked."""
    nvml_fails_as_with_mig = -1
    assert run_imports(nvml_fails_as_with_mig) == ["0 cuda []", "None", "cpu"]


@pytest.mark.trainer
def test_code_that_starts_the_driver_is_named() -> None:
    [first, reason, last] = run_imports(1, "torch.cuda._is_in_bad_fork = lambda: True; torch._C._cuda_init()")
    assert (first, last) == ("1 cuda []", "cpu")
    assert reason.startswith("the CUDA driver has started; CUDA was started by ")
    assert "<string>:" in reason
