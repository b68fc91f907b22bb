"""Real rank processes for tests, forked from a server that has already imported torch and diffusers."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_contract import environment
from finetune_contract.run_spec import RunSpec

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["testing.trainer.ranks_preload"])
DEADLINE_SECONDS = 240.0


@dataclass
class Ranks:
    """The ranks of one attempt at a job.

    Attributes:
        spec: the run.
        folder: parent of the job's folder, which is `folder/job`; the cache is next to it.
        attempt: number of the attempt.
        world_size: number of ranks.
        kill_at: stage of a save at which a rank sends itself SIGKILL, and how often the stage is passed before.
        kill_rank: the rank that is killed; default: the first one that reaches the stage.
        extra: additional environment variables of all ranks.
        own_disks: whether each rank runs on a separate node that shares neither job folder nor cache.
        saves_all: whether every due save waits for the last one instead of being skipped on a slow disk, so that e.g.
            the third save is of the same step on every machine.
        per_rank: additional environment variables of single ranks.
    """

    spec: RunSpec
    folder: Path
    attempt: int = 1
    world_size: int = 1
    kill_at: tuple[str, int] | None = None
    kill_rank: int | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    own_disks: bool = False
    saves_all: bool = False
    per_rank: Mapping[int, Mapping[str, str]] = field(default_factory=dict)

    def start(self) -> Ranks:
        """Start all ranks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "run.json").write_text(self.spec.to_json(), encoding="utf-8")
        port = free_port()
        self.processes = [
            _CONTEXT.Process(
                target=_rank,
                args=(self._environment(rank, port), self._log(rank), self._kill_at(rank), self.saves_all),
            )
            for rank in range(self.world_size)
        ]
        for process in self.processes:
            process.start()
        return self

    @property
    def job_dir(self) -> Path:
        """Return the job's folder of rank 0."""
        return self.disk(0) / "job"

    def disk(self, rank: int) -> Path:
        """Return the folder that represents a rank's disk."""
        return self.folder / f"disk-{rank}" if self.own_disks else self.folder

    def wait(self) -> list[int]:
        """Wait for all ranks and return their exit codes, negative for signals. Kill ranks that exceed the deadline."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self.processes:
            process.kill()
            process.join()
        return [int(process.exitcode or 0) for process in self.processes]

    def run(self) -> list[int]:
        """Start all ranks and wait until they exit; return their exit codes."""
        return self.start().wait()

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to ranks."""
        for rank in ranks:
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def wait_until(self, condition: Callable[[dict[str, Any]], bool], rank: int = 0) -> dict[str, Any]:
        """Wait for a report that meets a condition, and return it.

        Raises:
            AssertionError: the rank ended, or the deadline passed, without such a report.
        """
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            for report in self.reports(rank):
                if condition(report):
                    return report
            if not self.processes[rank].is_alive():
                break
            time.sleep(0.002)
        raise AssertionError(f"no such report; last: {self.reports(rank)[-1:]}\n{self.stderr(rank)}")

    def reports(self, rank: int = 0) -> list[dict[str, Any]]:
        """Return all reports of a rank so far."""
        path = self._log(rank).with_suffix(".reports")
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def stderr(self, rank: int = 0) -> str:
        """Return what a rank has written to stderr."""
        return self._log(rank).read_text(encoding="utf-8")

    def weights(self) -> bytes:
        """Return the exported LoRA."""
        return (self.job_dir / "outputs" / "pytorch_lora_weights.safetensors").read_bytes()

    def _kill_at(self, rank: int) -> tuple[str, int] | None:
        return self.kill_at if self.kill_rank in (None, rank) else None

    def _log(self, rank: int) -> Path:
        return self.folder / f"a{self.attempt}-r{rank}.log"

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": "0" if self.own_disks else str(rank),
            "LOCAL_WORLD_SIZE": "1" if self.own_disks else str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            environment.RUN_SPEC: str(self.folder / "run.json"),
            environment.ATTEMPT: str(self.attempt),
            environment.CHECKPOINT_DIR: str(self.disk(rank) / "job"),
            environment.CACHE_DIR: str((self.disk(rank) if self.own_disks else self.folder.parent) / "cache"),
            environment.BACKEND: "gloo",
            **self.extra,
            **self.per_rank.get(rank, {}),
        }


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(env: dict[str, str], log: Path, kill_at: tuple[str, int] | None, saves_all: bool) -> None:
    """Run a rank in this process."""
    from finetune_trainer import rank  # noqa: PLC0415  the tests themselves need no torch

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    reports = os.open(log.with_suffix(".reports"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.environ.update({**env, environment.REPORT_FD: str(reports)})
    reached: list[str] = []

    def on_save_stage(stage: str) -> None:
        if kill_at is not None and stage.startswith(kill_at[0]):
            reached.append(stage)
            if len(reached) > kill_at[1]:
                os.kill(os.getpid(), signal.SIGKILL)

    if "HF_ENDPOINT" in env:
        _use_hub(env["HF_ENDPOINT"], Path(env[environment.CACHE_DIR]) / "hub")
    if "TEST_LOG_BATCHES" in env:
        _log_batches(log.with_suffix(".batches"))
    if "TEST_OLD_CHECKPOINTS" in env:
        _write_old_checkpoints()
    if saves_all:
        _wait_for_each_save()
    if "TEST_SYNC_OFTEN" in env:
        from finetune_trainer.data.cache import stream_map  # noqa: PLC0415

        stream_map.SYNC_SECONDS = 0.0
    code = rank.main(os.environ, on_save_stage)
    sys.stderr.flush()
    os._exit(code)


def _use_hub(endpoint: str, cache: Path) -> None:
    """Use another hub. The server of the forks has imported the hub's library with the address of the public one."""
    from huggingface_hub import constants  # noqa: PLC0415  the tests themselves need no torch

    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = str(cache)
    os.environ["HF_HOME"] = str(cache)


def _write_old_checkpoints() -> None:
    """Write checkpoints without what older releases do not write: what the run trains, and on what."""
    from finetune_trainer.train.build import RunBuilder  # noqa: PLC0415  the tests themselves need no torch

    RunBuilder._about = lambda self: {}  # type: ignore[method-assign]


def _wait_for_each_save() -> None:
    """Check whether a save is due only after the last one has ended."""
    from finetune_trainer.checkpoint.checkpointer import Checkpointer  # noqa: PLC0415  the tests themselves need no torch

    due = Checkpointer.due

    def waiting_due(self: Any, step: int) -> bool:
        if self._task is not None:
            self._task.future.exception()
        return due(self, step)

    Checkpointer.due = waiting_due  # type: ignore[method-assign]


def _log_batches(path: Path) -> None:
    """Log the samples of every step of this rank."""
    from finetune_trainer.data.prefetch import Prefetcher  # noqa: PLC0415  the tests themselves need no torch
    from finetune_trainer.train.loop import Loop  # noqa: PLC0415

    take, accumulate = Prefetcher.take, Loop._accumulate
    step = 0

    def logging_accumulate(self: Any, number: int) -> None:
        nonlocal step
        step = number
        accumulate(self, number)

    def logging_take(self: Any, refs: Any, *more: Any) -> Any:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "refs": [(ref.epoch, ref.index) for ref in refs]}) + "\n")
        return take(self, refs, *more)

    Loop._accumulate = logging_accumulate  # type: ignore[method-assign, assignment]
    Prefetcher.take = logging_take  # type: ignore[method-assign, assignment]
