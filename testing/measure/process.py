"""Separate processes for measurements: memory that one case leaves behind must not count for another."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


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
