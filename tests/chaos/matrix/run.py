"""Runs one cell: a real job on the local cluster, a fault at its stage, and the result."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from finetune_contract.fork_socket import address_of, listen, server_command
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import pod_name
from finetune_operator.cli.clock import utc_now
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.jobs import create_job, key_of, remove_job
from finetune_operator.cluster.local.runner import SHUTDOWN_MESSAGE, LocalRun
from finetune_operator.cluster.local.settings import LOCAL
from finetune_operator.cluster.reconcile import ReconcileResult
from testing.trainer.scripts import PROGRAMS
from tests.chaos.matrix import faults
from tests.chaos.matrix.cells import DISK, OUTAGE, OUTAGES, Cell
from tests.chaos.matrix.supervisor import EVENTS_FOLDER, GPU_EVENTS

ROOT = Path(__file__).resolve().parents[3]
NUM_RANKS = 2
NUM_STEPS = 12
SAVE_EVERY = 5
TRAINING_STEP = 7
SCRIPT_ARGS = {"max_train_steps": NUM_STEPS, "num_samples": 24, "use_ema": True, "seed": 3}
"""Two epochs of six steps. The hook saves by the interval of the job."""
RANK_MODULES = {"recipe": "tests.chaos.matrix.rank", "script": "tests.chaos.matrix.script_rank"}
WEIGHTS = frozenset({".safetensors", ".pt"})
CELL_SECONDS = 120.0
HEAL_SECONDS = 3.0
"""Duration of a partition of supervisors, or of a fault of a disk."""
POLL_SECONDS = 0.005
SETTINGS = replace(LOCAL, failure_backoff_seconds=0.2, cause_seconds=1.5)


class StageNotReachedError(Exception):
    """A run never reached the stage of its cell."""


@dataclass(frozen=True)
class CellResult:
    """Result of one cell."""

    status: dict[str, Any]
    same_weights: bool | None
    seconds: float
    fault_to_step: float | None
    """Seconds from the fault to the first step after it; None if there was none."""
    fault_to_detection: float | None
    """Seconds from the fault until the reconcile detected the end of the attempt."""


@dataclass
class EndObserver:
    """Observes the reconcile results of a run, and detects the end of its first attempt."""

    ended_at: float | None = None
    on_end: list[Callable[[], None]] = field(default_factory=list)
    on_outages: list[Callable[[], None]] = field(default_factory=list)
    """Called when OUTAGES attempts have ended because of an outage."""
    warnings: list[str] = field(default_factory=list)

    def on_reconcile(self, result: ReconcileResult) -> None:
        """Store the time at which the end of the first attempt was detected."""
        attempts = result.job.status.attempts if result.job is not None else ()
        if self.ended_at is None and attempts and attempts[0].ended_at is not None:
            self.ended_at = time.monotonic()
        if attempts and attempts[0].reason is not None:
            while self.on_end:
                self.on_end.pop()()
        if sum(entry.reason == OUTAGE for entry in attempts) >= OUTAGES:
            while self.on_outages:
                self.on_outages.pop()()

    def warn(self, message: str) -> None:
        """Keep a warning."""
        self.warnings.append(message)


class MatrixHarness:
    """Shared by all cells: data, a fork server (as in `finetune run`), and the weights of the undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references: dict[str, str] = {}
        """Digest of the output of the undisturbed run of each job."""
        self._number = 0
        self._job = yaml.safe_load((ROOT / "examples/local/lora-circles.yaml").read_text())
        self._data = folder / "data"
        self._stack = ExitStack()
        self._fork_server = self._start_fork_server()
        command = [sys.executable, "-m", "finetune_trainer.demo.circles", str(self._data)]
        few = ["--style", "stripes", "--num-train", "16", "--num-validation", "4"]
        subprocess.run([*command, *few], check=True, stdout=subprocess.DEVNULL)

    def close(self) -> None:
        """Stop the fork server."""
        self._stack.close()

    def _start_fork_server(self) -> str:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with listen() as listening:
            process = subprocess.Popen(
                server_command(listening.fileno()), env={**env, "PYTHONUNBUFFERED": "1"}, pass_fds=(listening.fileno(),)
            )
            self._stack.callback(process.wait)
            self._stack.callback(process.kill)
            return address_of(listening)

    def next_folder(self) -> Path:
        """Return a new folder for a cell."""
        self._number += 1
        return self.folder / f"cell-{self._number}"

    def job(self, kind: str, cell: Cell | None, environment: CellEnvironment) -> FineTuneJob:
        """Return the job of a cell; without a cell, an undisturbed one."""
        job = json.loads(json.dumps(self._job))
        job["metadata"]["name"] = "matrix"
        spec = job["spec"]
        spec["model"]["base"] = str(ROOT / "examples/base-circles")
        spec["dataset"]["source"] = str(self._data)
        validation = {"split": "validation", "steps": NUM_STEPS // 2}
        training: dict[str, Any] = {"steps": NUM_STEPS, "batchSize": 2, "lrWarmupSteps": 2}
        if cell is None or cell.stage == "validating":
            training["validation"] = validation
        else:
            spec["training"].pop("validation")
        spec["training"] |= training
        spec["training"]["lora"]["rank"] = 4
        spec["checkpoint"] = {
            "interval": {"steps": SAVE_EVERY},
            "keep": 2,
            # Time that training continues without a new checkpoint.
            "maxStale": "5s",
            "storage": {"hostPath": {"path": str(environment.shared)}},
        }
        hang = "5s" if cell is not None and cell.needs_timeout else "2m"
        spec["recovery"] = {"maxFailures": 2, "noticeSeconds": 10, "hangTimeout": hang}
        spec["outputs"] = [{"format": "diffusers", "to": str(environment.shared / "out")}]
        if kind == "script":
            spec["training"] = {"script": {"path": str(PROGRAMS / "train_style.py"), "args": SCRIPT_ARGS}}
            spec["outputs"][0]["format"] = "asWritten"
        spec["podTemplate"] = {"spec": {"containers": [self._container(kind, cell, environment)]}}
        return FineTuneJob.model_validate(job)

    def _container(self, kind: str, cell: Cell | None, environment: CellEnvironment) -> dict[str, Any]:
        stop_point = {
            "stage": cell.stage if cell else "",
            "ranks": cell.stopped_ranks if cell else (),
            "folder": str(environment.stops),
            "step": TRAINING_STEP,
            "save_step": SAVE_EVERY,
        }
        if cell is not None and cell.fault == "read-only" and cell.target == "rank 1":
            stop_point["mount"] = str(environment.shared)
        env = {
            "PYTHONPATH": str(ROOT),
            "MATRIX_STOP_POINT": json.dumps(stop_point),
            "MATRIX_PROXIES": ",".join(str(proxy.port) for proxy in environment.proxies),
            EVENTS_FOLDER: str(environment.stops),
            "FINETUNE_FORK_SERVER": self._fork_server,
        }
        return {
            "name": "trainer",
            "command": [sys.executable, "-m", "tests.chaos.matrix.supervisor", RANK_MODULES[kind]],
            "env": [{"name": name, "value": value} for name, value in env.items()],
        }

    async def run(self, cell: Cell | None, *, in_place: bool = True, kind: str = "recipe") -> CellResult:
        """Run a cell, or a job of this kind without a fault."""
        began, kind = time.monotonic(), cell.job if cell is not None else kind
        environment = CellEnvironment(self.next_folder(), cell)
        with environment:
            for proxy in environment.proxies:
                await proxy.start()
            home = Home(environment.state)
            job = create_job(home, self.job(kind, cell, environment), utc_now)
            settings = replace(SETTINGS, hold_seconds=SETTINGS.hold_seconds if in_place else 0.0)
            if cell is not None and cell.needs_timeout:
                settings = replace(settings, standstill_seconds=6.0, beat_timeout_seconds=4.0)
            observer = EndObserver()
            run = LocalRun(home, job, observer, utc_now, settings)
            environment.run = run
            task = asyncio.create_task(run.run())
            try:
                fault_at = await FaultInjection(cell, environment, observer, task).inject() if cell else None
                async with asyncio.timeout(CELL_SECONDS):
                    result = await task
            except TimeoutError:
                result = ReconcileResult(run.cluster.job if run.cluster else None)
                fault_at = None
            finally:
                environment.stop_proxies()
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
                if cell is None or os.environ.get("MATRIX_KEEP") is None:
                    await asyncio.to_thread(remove_job, home, key_of(job))
            status = result.job.status.model_dump(mode="json", by_alias=True, exclude_none=True) if result.job else {}
            weights = environment.weights()
            fault_to_step = environment.first_step_after(fault_at) if fault_at is not None else None
        same = None if not weights else weights == self.references.get(kind)
        if cell is None:
            self.references[kind], same = weights, True
        detection = observer.ended_at - fault_at if fault_at is not None and observer.ended_at is not None else None
        return CellResult(status, same, time.monotonic() - began, fault_to_step, detection)


class CellEnvironment:
    """The folders, disks and proxies of one cell."""

    def __init__(self, folder: Path, cell: Cell | None) -> None:
        self.shared, self.state, self.stops = folder / "shared", folder / "state", folder / "stops"
        self.proxies = [faults.CoordinatorProxy(self._coordinator_port) for _ in range(NUM_RANKS)]
        self.run: LocalRun | None = None
        self.disk: faults.SmallDisk | None = None
        self._folder = folder
        self._cell = cell
        self._stack = ExitStack()

    def __enter__(self) -> CellEnvironment:
        self.stops.mkdir(parents=True)
        self.shared.mkdir()
        if self._cell is not None and self._cell.fault in DISK:
            target = self.state if self._cell.target == "supervisor" else self.shared
            self.disk = self._stack.enter_context(faults.SmallDisk(target, 48))
        self.state.mkdir(exist_ok=True)
        (self.shared / "cache").mkdir()
        (self.state / "cache").symlink_to(self.shared / "cache")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if os.environ.get("MATRIX_KEEP") is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def stop_proxies(self) -> None:
        """Close the proxies."""
        for proxy in self.proxies:
            proxy.stop()

    def weights(self) -> str:
        """Return the digest of the output; empty if there is none."""
        digest = hashlib.sha256()
        files = sorted(path for path in (self.shared / "out").glob("*") if path.suffix in WEIGHTS)
        for path in files:
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest() if files else ""

    def first_step_after(self, begin: float) -> float | None:
        """Return the seconds from a time to the next first step of an attempt after attempt 1."""
        times = [float(path.read_text()) for path in self.stops.glob("stepped-*") if "-1-" not in path.name[7:10]]
        later = [time - begin for time in times if time > begin]
        return min(later, default=None)

    def rank_pid(self, rank: int) -> int | None:
        """Return the process id of a rank in attempt 1."""
        path = self.stops / f"pid-1-{rank}"
        return int(path.read_text()) if path.exists() else None

    def _coordinator_port(self) -> int:
        assert self.run is not None
        return self.run.cluster.ports.coordinator_port if self.run.cluster else 0


class FaultInjection:
    """Waits until the ranks reach the stage of a cell, and injects its fault."""

    def __init__(
        self, cell: Cell, environment: CellEnvironment, observer: EndObserver, task: asyncio.Task[ReconcileResult]
    ) -> None:
        self._cell = cell
        self._environment = environment
        self._observer = observer
        self._task = task

    async def inject(self) -> float:
        """Inject the fault when the stopped ranks are at its stage; return the time."""
        cell, environment = self._cell, self._environment
        await self._until(lambda: all((environment.stops / f"reached-{rank}").exists() for rank in cell.stopped_ranks))
        await self._until(lambda: all(environment.rank_pid(rank) for rank in range(NUM_RANKS)))
        fault_at = time.monotonic()
        orders = await getattr(self, "_" + cell.fault.replace(" ", "_").replace("-", "_").lower())()
        for rank in cell.continued_ranks:
            (environment.stops / f"order-{rank}").write_text((orders or {}).get(rank, "go"))
        return fault_at

    async def _until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(CELL_SECONDS):
            while not reached():
                if self._task.done():
                    job = self._task.result().job
                    message = job.status.message if job is not None else "the job is deleted"
                    raise StageNotReachedError(f"the run ended before it reached the stage: {message}")
                await asyncio.sleep(POLL_SECONDS)

    # -- targets -------------------------------------------------------------------------------------------------------

    @property
    def _ranks(self) -> list[int]:
        pids = [self._environment.rank_pid(rank) for rank in self._cell.victims]
        return [pid for pid in pids if pid]

    @property
    def _supervisors(self) -> list[int]:
        pods = [self._pod(rank) for rank in self._cell.victims]
        return [pod.processes.container.pid for pod in pods if pod is not None and pod.processes is not None]

    def _pod(self, rank: int) -> Any:
        run = self._environment.run
        assert run is not None
        assert run.cluster is not None
        return run.cluster.kubelet.get(pod_name("matrix", 1, rank))

    @property
    def _kubelet(self) -> Any:
        run = self._environment.run
        assert run is not None
        assert run.cluster is not None
        return run.cluster.kubelet

    @property
    def _targets_supervisor(self) -> bool:
        return self._cell.target == "supervisor"

    # -- the faults ---------------------------------------------------------------------------------------------------

    async def _notice(self) -> None:
        """Announce the preemption of the node; for the supervisor: send SIGTERM to it without a reason."""
        if self._targets_supervisor:
            faults.signal_all(self._supervisors, signal.SIGTERM)
            return
        for rank in self._cell.victims:
            await self._kubelet.preempt(pod_name("matrix", 1, rank), "TerminationByKubelet", SHUTDOWN_MESSAGE)

    async def _xid(self) -> None:
        """Let the driver of the ranks' GPUs report that one has fallen off the bus. A stand-in for NVML does it."""
        for rank in self._cell.victims:
            (self._environment.stops / f"{GPU_EVENTS}-{rank}").write_text("[0, 79]\n")

    async def _sigkill(self) -> None:
        """Kill the process; for all ranks: kill the pods."""
        if self._cell.target == "all":
            for rank in self._cell.victims:
                await self._kubelet.kill_pod(pod_name("matrix", 1, rank))
        else:
            faults.signal_all(self._supervisors if self._targets_supervisor else self._ranks, signal.SIGKILL)

    async def _hang(self) -> None:
        """Stop the process."""
        faults.signal_all(self._supervisors if self._targets_supervisor else self._ranks, signal.SIGSTOP)

    async def _memory(self) -> Mapping[int, str] | None:
        """Let a rank allocate more than its limit; let the kernel's OOM killer kill a supervisor."""
        if not self._targets_supervisor:
            return dict.fromkeys(self._cell.victims, "memory")
        for pid in self._supervisors:
            self._observer.on_end.append(faults.starve(pid, f"kill-matrix-{pid}"))
        return None

    async def _exit_1(self) -> Mapping[int, str] | None:
        """Let the program exit with code 1."""
        if not self._targets_supervisor:
            return dict.fromkeys(self._cell.victims, "exit")
        faults.signal_all(self._supervisors, signal.SIGUSR2)
        return None

    async def _full_disk(self) -> None:
        """Fill the shared storage; for rank 1: limit its file size; for the supervisor: fill the disk of its files."""
        if self._cell.target == "rank 1":
            for pid in self._ranks:
                faults.forbid_writes(pid)
            return
        assert self._environment.disk is not None
        self._environment.disk.fill()
        self._heal_later()

    async def _read_only(self) -> None:
        """Make the disk read-only; for rank 1: only in its mount namespace."""
        if self._cell.target == "rank 1":
            for pid in self._ranks:
                faults.mount_private_read_only(pid, self._environment.shared)
            return
        assert self._environment.disk is not None
        self._environment.disk.make_read_only()
        self._heal_later()

    async def _partition(self) -> None:
        """Cut ranks off from their peers; cut supervisors off from the coordinator for some seconds."""
        if not self._targets_supervisor:
            for pid in self._ranks:
                faults.cut_off(pid)
        if self._cell.target in {"supervisor", "all"}:
            for rank in self._cell.victims:
                proxy = self._environment.proxies[rank]
                proxy.freeze()
                asyncio.get_running_loop().call_later(HEAL_SECONDS, proxy.thaw)

    def _heal_later(self) -> None:
        assert self._environment.disk is not None
        heal = self._environment.disk.heal
        if self._cell.is_permanent:
            self._observer.on_outages.append(heal)
        else:
            # Training tolerates a temporary fault of the disk. An attempt that has not begun to train fails, and the
            # next one finds a working disk.
            self._observer.on_end.append(heal)
            asyncio.get_running_loop().call_later(HEAL_SECONDS, heal)


def median(values: list[float]) -> float | None:
    """Return the median, rounded to tenths; None if there are no values."""
    return round(statistics.median(values), 1) if values else None
