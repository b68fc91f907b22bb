"""Connects a session to the objects of accelerate: replaces their methods in this process, before the script runs.

The script is not changed. Each replacement receives the original method, and calls it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from finetune_contract.heartbeat import RankState
from finetune_contract.manifest import BadCheckpointError, verify
from finetune_trainer.errors import StorageError
from finetune_trainer.report import Reporter
from finetune_trainer.script.checkpoints import is_committed
from finetune_trainer.script.session import Session

Original = Callable[..., Any]


def replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replace a function.

    Args:
        owner: module or class.
        name: of the function.
        replacement: called with the original function and its arguments.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(owner, name, run)


def install(session: Session, reporter: Reporter, job_uid: str) -> None:
    """Connect a session to accelerate, torch and diffusers."""
    AcceleratorHook(session, reporter, job_uid).install()
    LoaderHook(session).install()
    StepHook(session).install()
    PythonHook(session).install()


def keep_group() -> None:
    """Let the script use the process group of this rank, and keep it until the end.

    The script's own call to create one does nothing, and neither does its call to destroy it.
    """

    def create(original: Original, *args: Any, **kwargs: Any) -> None:
        if not dist.is_initialized():
            original(*args, **kwargs)

    replace(dist, "init_process_group", create)
    replace(dist.distributed_c10d, "init_process_group", create)
    replace(dist, "destroy_process_group", lambda *_args, **_kwargs: None)


class AcceleratorHook:
    """Replaces the methods of `Accelerator`."""

    def __init__(self, session: Session, reporter: Reporter, job_uid: str) -> None:
        self._session = session
        self._reporter = reporter
        self._job_uid = job_uid

    def install(self) -> None:
        """Replace the methods."""
        from accelerate import Accelerator  # noqa: PLC0415  the script's requirements choose its version

        replace(importlib.import_module("accelerate.state").AcceleratorState, "__init__", _use_fsdp_on_cpus)
        replace(Accelerator, "__init__", self._create)
        replace(Accelerator, "prepare", _share_weights_on_cpus)
        replace(Accelerator, "prepare_data_loader", self._prepare)
        replace(Accelerator, "save_state", self._save)
        replace(Accelerator, "load_state", self._load)
        replace(Accelerator, "backward", self._backward)
        replace(Accelerator, "log", self._log)
        replace(Accelerator, "wait_for_everyone", self._finish)
        replace(Accelerator, "end_training", self._finish)

    def _create(self, original: Original, accelerator: Any, *args: Any, **kwargs: Any) -> None:
        original(accelerator, *args, **kwargs)
        self._session.bind(accelerator)

    def _prepare(self, original: Original, accelerator: Any, *args: Any, **kwargs: Any) -> Any:
        loader = original(accelerator, *args, **kwargs)
        self._session.track(loader)
        return loader

    def _save(
        self, original: Original, accelerator: Any, output_dir: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        folder = None if output_dir is None else str(Path(output_dir).expanduser())
        return self._session.save_by_script(folder, lambda path: original(accelerator, path, *args, **kwargs))

    def _load(
        self, original: Original, accelerator: Any, input_dir: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        self._reporter.state(RankState.RESTORING)
        folder = None if input_dir is None else Path(input_dir).expanduser()
        step = None if folder is None else _verified_step(folder, self._job_uid)
        result = original(accelerator, input_dir, *args, **kwargs)
        if folder is not None:
            self._session.loaded(folder, step)
        return result

    def _backward(self, original: Original, accelerator: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        self._session.before_backward()
        result = original(accelerator, loss, *args, **kwargs)
        self._session.figures.saw_loss(loss)
        return result

    def _log(self, original: Original, accelerator: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        self._session.figures.saw_log(values)
        return original(accelerator, values, *args, **kwargs)

    def _finish(self, original: Original, accelerator: Any, *args: Any, **kwargs: Any) -> Any:
        self._session.finish()
        return original(accelerator, *args, **kwargs)


def _use_fsdp_on_cpus(original: Original, state: Any, *args: Any, **kwargs: Any) -> None:
    """Divide the model over CPU ranks, too: accelerate ignores a request for FSDP there."""
    original(state, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if plugin is None or state.distributed_type.name != "MULTI_CPU":
        return
    if state._mixed_precision != "no":
        plugin.set_mixed_precision(state._mixed_precision)
    state.fsdp_plugin = plugin
    # FSDP refuses a CPU with a number.
    changes = {"distributed_type": type(state.distributed_type).FSDP, "device": torch.device("cpu")}
    for shared in (state.__dict__, importlib.import_module("accelerate.state").PartialState._shared_state):
        shared.update(changes)


def _share_weights_on_cpus(original: Original, accelerator: Any, *args: Any, **kwargs: Any) -> Any:
    """Give all ranks the weights of rank 0, as DDP does, before FSDP divides them over CPU ranks."""
    if accelerator.distributed_type.name == "FSDP" and accelerator.device.type == "cpu":
        for module in (each for each in args if isinstance(each, torch.nn.Module)):
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), src=0)
    return original(accelerator, *args, **kwargs)


def _verified_step(folder: Path, job_uid: str) -> int | None:
    """Return the step of a checkpoint; None if it has no manifest, so that it is not of this job.

    Raises:
        StorageError: it is damaged.
    """
    if not is_committed(folder):
        return None
    try:
        return verify(folder, job_uid).step
    except BadCheckpointError as error:
        raise StorageError(f"checkpoint {folder.name} is damaged: {error}") from error


class LoaderHook:
    """Replaces the iterators of the loaders."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def install(self) -> None:
        """Replace the methods."""
        data_loader = importlib.import_module("accelerate.data_loader")
        replace(data_loader.DataLoaderShard, "__iter__", self._iterate)
        replace(data_loader.DataLoaderDispatcher, "__iter__", self._iterate)
        replace(DataLoader, "__iter__", self._read)
        for name in ("accelerate.data_loader", "accelerate", "accelerate.accelerator"):
            module = importlib.import_module(name)
            if hasattr(module, "skip_first_batches"):
                replace(module, "skip_first_batches", self._skip)

    def _iterate(self, original: Original, loader: Any) -> Iterator[Any]:
        tracked = self._session.tracked(loader)
        source: Iterator[Any] = original(loader) if tracked is None else tracked.iterate(original)
        return source

    @staticmethod
    def _read(original: Original, base: Any) -> Iterator[Any]:
        tracked = base.__dict__.get("finetune_loader")
        source: Iterator[Any] = original(base) if tracked is None or not tracked.is_active else tracked.read(original)
        return source

    def _skip(self, original: Original, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        tracked = self._session.tracked(dataloader)
        # The hook restores the exact position itself.
        return dataloader if tracked is not None and tracked.is_resumed else original(dataloader, *args, **kwargs)


class StepHook:
    """Follows the steps of the optimizers: those that accelerate has prepared, and others."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def install(self) -> None:
        """Replace the methods, and register with torch."""
        optimizers = [importlib.import_module("accelerate.optimizer").AcceleratedOptimizer]
        with contextlib.suppress(ImportError, AttributeError):
            optimizers.append(importlib.import_module("accelerate.utils.deepspeed").DeepSpeedOptimizerWrapper)
        for optimizer in optimizers:
            if "step" in optimizer.__dict__:
                replace(optimizer, "step", self._step)
        register_optimizer_step_pre_hook(self._before_other)
        register_optimizer_step_post_hook(self._after_other)

    def _step(self, original: Original, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not optimizer.gradient_state.sync_gradients:
            return original(optimizer, *args, **kwargs)
        self._session.before_step(optimizer)
        result = original(optimizer, *args, **kwargs)
        self._session.after_step(optimizer)
        return result

    def _before_other(self, optimizer: Any, *_: Any) -> None:
        if self._is_unprepared(optimizer):
            self._session.before_step(optimizer)

    def _after_other(self, optimizer: Any, *_: Any) -> None:
        if self._session.accelerator is None:
            self._session.count_step(optimizer)
        elif self._is_unprepared(optimizer):
            self._session.after_step(optimizer)

    def _is_unprepared(self, optimizer: Any) -> bool:
        """Return whether a script that uses accelerate steps an optimizer that accelerate does not know."""
        accelerator = self._session.accelerator
        if accelerator is None or not accelerator.sync_gradients:
            return False
        return not any(inner is optimizer for each in accelerator._optimizers for inner in _wrapped(each))


def _wrapped(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and those that it wraps. ZeRO wraps that of the script, and steps it once for each group."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


class PythonHook:
    """Replaces functions of torch, Python, tqdm and diffusers."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def install(self) -> None:
        """Replace the functions."""
        replace(torch, "manual_seed", self._seed)
        replace(shutil, "rmtree", self._remove)
        with contextlib.suppress(ImportError):
            replace(importlib.import_module("tqdm.std").tqdm, "__init__", self._bar)
        self._session.on_boundary(self._install_pipelines)

    def _install_pipelines(self) -> bool:
        """Follow the pipelines of diffusers once the script has imported them, which takes seconds.

        Returns:
            Whether that is done.
        """
        pipelines = sys.modules.get("diffusers.pipelines.pipeline_utils")
        if pipelines is None or not hasattr(pipelines, "DiffusionPipeline"):
            return False
        replace(pipelines.DiffusionPipeline, "progress_bar", self._draw)
        return True

    def _seed(self, original: Original, *args: Any, **kwargs: Any) -> Any:
        self._session.num_seeds += 1
        return original(*args, **kwargs)

    def _remove(self, original: Original, path: Any, *args: Any, **kwargs: Any) -> None:
        if not (isinstance(path, (str, Path)) and self._session.deletes_later(Path(path).absolute())):
            original(path, *args, **kwargs)

    def _bar(self, original: Original, bar: Any, *args: Any, **kwargs: Any) -> None:
        original(bar, *args, **kwargs)
        if self._session.step_bar_is_open and "Step" in str(kwargs.get("desc")):
            self._session.figures.saw_progress_bar(getattr(bar, "total", None))

    def _draw(self, original: Original, *args: Any, **kwargs: Any) -> Any:
        self._session.validates()
        return original(*args, **kwargs)
