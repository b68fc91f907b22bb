"""A process of its own for what is measured: what one case leaves in memory would count as another's."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_a_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of a module in a fresh process.

    Raises:
        BrokenProcessPool: the process was killed, as by a machine that is out of memory.
    """
    with another_process() as pool:
        return pool.submit(function, *args, **kwargs).result()


def another_process() -> ProcessPoolExecutor:
    """One fresh process that calls functions, one after the other; nothing is said after what this process says."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


@contextmanager
def elsewhere(make: Callable[P, Callable[[], T]], *args: P.args, **kwargs: P.kwargs) -> Iterator[Callable[[], T]]:
    """Make something in a fresh process; each call is carried out there, while this process waits.

    Raises:
        BrokenProcessPool: the process was killed.
    """
    with another_process() as pool:
        pool.submit(_make, make, args, kwargs).result()
        yield lambda: pool.submit(_call).result()


_made: Callable[[], Any]
"""What `elsewhere` has made in this process."""


def _make(make: Callable[..., Callable[[], Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _made  # noqa: PLW0603  the process is there for it alone
    _made = make(*args, **kwargs)


def _call() -> Any:
    return _made()
