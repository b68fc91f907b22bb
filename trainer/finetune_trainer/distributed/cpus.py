"""CPUs of the threads that do not compute: a thread inherits them from the one that starts it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from finetune_contract import environment
from finetune_contract.cpu.machine import parse_cpu_list


@contextlib.contextmanager
def communication_cpus(env: Mapping[str, str]) -> Iterator[None]:
    """Let the threads that start in this block run on the CPUs for communication, if the rank has some.

    The calling thread returns to its own CPUs at the end. CPUs that the pod no longer has are ignored.
    """
    cpus = parse_cpu_list(env.get(environment.COMMUNICATION_CPUS, ""))
    before = os.sched_getaffinity(0)
    try:
        _move(cpus)
        yield
    finally:
        _move(before)


def use_helper_cpus(env: Mapping[str, str] = os.environ) -> None:
    """Let the calling thread run on all hardware threads of its rank: it must not slow down the compute threads."""
    _move(parse_cpu_list(env.get(environment.HELPER_CPUS, "")))


def _move(cpus: set[int] | tuple[int, ...]) -> None:
    if cpus:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cpus)
