"""Heap settings that keep freed memory, in separate processes, because they cannot be undone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

NUM_BLOCKS = 4
BLOCK_BYTES = 64 * 2**20
PROGRAM = f"""
import os, resource
from finetune_trainer import heap

def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def use(): return [bytearray(b"x") * {BLOCK_BYTES} for _ in range({NUM_BLOCKS})]

kept = heap.keep_freed_memory(os.environ)
use()
before = faults()
use()
again, full = faults() - before, resident()
heap.release_free_memory()
print(int(kept), again, full - resident())
"""


def run(**environment: str) -> tuple[bool, int, int]:
    """Return whether freed memory is kept, the page faults of the second use, and the bytes that were released."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | environment, capture_output=True, text=True, check=True, timeout=60
    )
    kept, faults, given_back = map(int, done.stdout.split())
    return bool(kept), faults, given_back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
def test_freed_memory_is_reused_until_it_is_released() -> None:
    kept, faults, given_back = run()
    assert kept
    num_pages = NUM_BLOCKS * BLOCK_BYTES // os.sysconf("SC_PAGE_SIZE")
    assert faults < num_pages / 100
    assert given_back > NUM_BLOCKS * BLOCK_BYTES / 2


def test_malloc_settings_of_the_environment_are_kept() -> None:
    assert not run(MALLOC_ARENA_MAX="2")[0]
