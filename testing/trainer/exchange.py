"""Real ranks that exchange gradients over gloo on this machine; used by the tests of the exchange.

Every rank is a process. All ranks call the same function, which uses the collectives of its World.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from finetune_trainer.distributed.world import World

P = ParamSpec("P")
T = TypeVar("T")


def run_on_ranks(
    world_size: int, store: Path, function: Callable[Concatenate[World, P], T], *args: P.args, **kwargs: P.kwargs
) -> list[T]:
    """Call a function of a module on every rank of a new world, and return the results by rank.

    Args:
        world_size: number of ranks.
        store: path of a new file, through which the ranks find each other.
        function: its first argument is the rank's World.
        args: further arguments.
        kwargs: further arguments.
    """
    with ProcessPoolExecutor(world_size, multiprocessing.get_context("spawn")) as pool:
        call = functools.partial(_call, function, args, kwargs)
        calls = [pool.submit(_run, rank, world_size, store, call) for rank in range(world_size)]
        return [each.result() for each in calls]


def _run(rank: int, world_size: int, store: Path, call: Callable[[World], T]) -> T:
    torch.set_num_threads(1)
    files = dist.FileStore(str(store), world_size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=files)
    try:
        return call(World(rank, world_size, 0, torch.device("cpu")))
    finally:
        dist.destroy_process_group()


def _call(function: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object], world: World) -> T:
    return function(world, *args, **kwargs)
