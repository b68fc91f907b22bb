"""Separate processes for measurements and checks: memory that one leaves behind must not count for another."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

ROOT = Path(__file__).resolve().parents[2]
P = ParamSpec("P")
T = TypeVar("T")


def run_program(module: str, *arguments: str) -> dict[str, Any]:
    """Run a program of this repository, and return the JSON object of its last line.

    Raises:
        AssertionError: the program failed.
    """
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def call_in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of a module in a new process.

    Raises:
        BrokenProcessPool: the process was killed, for example when memory runs out.
    """
    with new_process_pool() as pool:
        return pool.submit(function, *args, **kwargs).result()


def new_process_pool() -> ProcessPoolExecutor:
    """Return an executor with one new process, which calls functions one after the other."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


@contextmanager
def build_in_new_process(
    build: Callable[P, Callable[[], T]], *args: P.args, **kwargs: P.kwargs
) -> Iterator[Callable[[], T]]:
    """Call `build` in a new process, and yield a function that runs its result there.

    Raises:
        BrokenProcessPool: the process was killed.
    """
    with new_process_pool() as pool:
        pool.submit(_build, build, args, kwargs).result()
        yield lambda: pool.submit(_call).result()


_built: Callable[[], Any]
"""The function that `build_in_new_process` has built in this process."""


def _build(build: Callable[..., Callable[[], Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _built  # noqa: PLW0603  the process serves only this function
    _built = build(*args, **kwargs)


def _call() -> Any:
    return _built()
