"""One cell: a real job on the local cluster, a fault at its moment, and what became of it."""

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
from tests.chaos.matrix import faults
from tests.chaos.matrix.cells import DISK, Cell

ROOT = Path(__file__).resolve().parents[3]
NUM_RANKS = 2
NUM_STEPS = 12
SAVE_EVERY = 5
TRAINING_STEP = 7
CELL_SECONDS = 120.0
HEAL_SECONDS = 3.0
"""How long a partition of the supervisors, or a full disk of theirs, lasts."""
POLL_SECONDS = 0.005
SETTINGS = replace(LOCAL, failure_backoff_seconds=0.2, cause_seconds=1.5)


class MomentMissedError(Exception):
    """A run never came to the stage of its cell."""


@dataclass(frozen=True)
class Outcome:
    """What a cell ended with."""

    status: dict[str, Any]
    same_weights: bool | None
    seconds: float
    fault_to_step: float | None
    """Seconds from the fault to the first step after it; None where there was none."""
    fault_to_end_seen: float | None
    """Seconds from the fault until the attempt was known to have ended."""


@dataclass
class Watch:
    """Sees the passes of a run."""

    ended_at: float | None = None
    on_end: list[Callable[[], None]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def on_reconcile(self, result: ReconcileResult) -> None:
        """Note when the first attempt was seen to end."""
        attempts = result.job.status.attempts if result.job is not None else ()
        if self.ended_at is None and attempts and attempts[0].ended_at is not None:
            self.ended_at = time.monotonic()
        if attempts and attempts[0].reason is not None:
            while self.on_end:
                self.on_end.pop()()

    def warn(self, message: str) -> None:
        """Keep a warning."""
        self.warnings.append(message)


class Bed:
    """What all cells share: data, the imports of the ranks (as `finetune run` has it), and the undisturbed weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.truth = ""
        self._number = 0
        self._job = yaml.safe_load((ROOT / "examples/lora-circles.yaml").read_text())
        self._data = folder / "data"
        self._stack = ExitStack()
        self._fork_server = self._start_fork_server()
        command = [sys.executable, "-m", "finetune_trainer.demo.circles", str(self._data)]
        few = ["--style", "stripes", "--num-train", "16", "--num-validation", "4"]
        subprocess.run([*command, *few], check=True, stdout=subprocess.DEVNULL)

    def close(self) -> None:
        """End what was started."""
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
        """A folder for a cell."""
        self._number += 1
        return self.folder / f"cell-{self._number}"

    def job(self, cell: Cell | None, ground: Ground) -> FineTuneJob:
        """The job of a cell."""
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
            # Training goes on without checkpoints for as long as this.
            "maxStale": "5s",
            "storage": {"hostPath": {"path": str(ground.shared)}},
        }
        hang = "5s" if cell is not None and cell.stands_still else "2m"
        spec["recovery"] = {"maxFailures": 2, "noticeSeconds": 10, "hangTimeout": hang}
        spec["outputs"] = [{"format": "diffusers", "to": str(ground.shared / "out")}]
        spec["podTemplate"] = {"spec": {"containers": [self._container(cell, ground)]}}
        return FineTuneJob.model_validate(job)

    def _container(self, cell: Cell | None, ground: Ground) -> dict[str, Any]:
        aim = {
            "stage": cell.stage if cell else "",
            "ranks": cell.aimed if cell else (),
            "folder": str(ground.aim),
            "step": TRAINING_STEP,
            "save_step": SAVE_EVERY,
        }
        if cell is not None and cell.fault == "read-only" and cell.target == "rank 1":
            aim["mount"] = str(ground.shared)
        env = {
            "PYTHONPATH": str(ROOT),
            "MATRIX_AIM": json.dumps(aim),
            "MATRIX_PROXIES": ",".join(str(proxy.port) for proxy in ground.proxies),
            "FINETUNE_FORK_SERVER": self._fork_server,
        }
        return {
            "name": "trainer",
            "command": [sys.executable, "-m", "tests.chaos.matrix.supervisor"],
            "env": [{"name": name, "value": value} for name, value in env.items()],
        }

    async def run(self, cell: Cell | None, *, in_place: bool = True) -> Outcome:
        """Run a cell, or the job undisturbed."""
        began = time.monotonic()
        ground = Ground(self.next_folder(), cell)
        with ground:
            for proxy in ground.proxies:
                await proxy.start()
            home = Home(ground.state)
            job = create_job(home, self.job(cell, ground), utc_now)
            settings = replace(SETTINGS, hold_seconds=SETTINGS.hold_seconds if in_place else 0.0)
            if cell is not None and cell.stands_still:
                settings = replace(settings, standstill_seconds=6.0, beat_timeout_seconds=4.0)
            watch = Watch()
            run = LocalRun(home, job, watch, utc_now, settings)
            ground.run = run
            task = asyncio.create_task(run.run())
            try:
                struck_at = await Strike(cell, ground, watch, task).strike() if cell else None
                async with asyncio.timeout(CELL_SECONDS):
                    seen = await task
            except TimeoutError:
                seen = ReconcileResult(run.cluster.job if run.cluster else None)
                struck_at = None
            finally:
                ground.stop_proxies()
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
                if cell is None or os.environ.get("MATRIX_KEEP") is None:
                    await asyncio.to_thread(remove_job, home, key_of(job))
            status = seen.job.status.model_dump(mode="json", by_alias=True, exclude_none=True) if seen.job else {}
            weights = ground.weights()
            fault_to_step = ground.first_step_after(struck_at) if struck_at is not None else None
        same = None if not weights else weights == self.truth
        if cell is None:
            self.truth, same = weights, True
        seen_after = watch.ended_at - struck_at if struck_at is not None and watch.ended_at is not None else None
        return Outcome(status, same, time.monotonic() - began, fault_to_step, seen_after)


class Ground:
    """The folders, disks and proxies of one cell."""

    def __init__(self, folder: Path, cell: Cell | None) -> None:
        self.shared, self.state, self.aim = folder / "shared", folder / "state", folder / "aim"
        self.proxies = [faults.Proxy(self._coordinator_port) for _ in range(NUM_RANKS)]
        self.run: LocalRun | None = None
        self.disk: faults.Disk | None = None
        self._folder = folder
        self._cell = cell
        self._stack = ExitStack()

    def __enter__(self) -> Ground:
        self.aim.mkdir(parents=True)
        self.shared.mkdir()
        if self._cell is not None and self._cell.fault in DISK:
            hit = self.state if self._cell.target == "supervisor" else self.shared
            self.disk = self._stack.enter_context(faults.Disk(hit, 48))
        self.state.mkdir(exist_ok=True)
        (self.shared / "cache").mkdir()
        (self.state / "cache").symlink_to(self.shared / "cache")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if os.environ.get("MATRIX_KEEP") is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def stop_proxies(self) -> None:
        """Close them."""
        for proxy in self.proxies:
            proxy.stop()

    def weights(self) -> str:
        """Digest of the output; empty where there is none."""
        digest = hashlib.sha256()
        files = sorted((self.shared / "out").glob("*.safetensors"))
        for path in files:
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest() if files else ""

    def first_step_after(self, moment: float) -> float | None:
        """Seconds from a moment to the first step of an attempt after the first."""
        times = [float(path.read_text()) for path in self.aim.glob("stepped-*") if "-1-" not in path.name[7:10]]
        later = [time - moment for time in times if time > moment]
        return min(later, default=None)

    def rank_pid(self, rank: int) -> int | None:
        """Process of a rank in attempt 1."""
        path = self.aim / f"pid-1-{rank}"
        return int(path.read_text()) if path.exists() else None

    def _coordinator_port(self) -> int:
        assert self.run is not None
        return self.run.cluster.ports.coordinator_port if self.run.cluster else 0


class Strike:
    """Waits for the moment of a cell and does what is to be done."""

    def __init__(self, cell: Cell, ground: Ground, watch: Watch, task: asyncio.Task[ReconcileResult]) -> None:
        self._cell = cell
        self._ground = ground
        self._watch = watch
        self._task = task

    async def strike(self) -> float:
        """Do the fault when the aimed ranks are at its stage; return the moment."""
        cell, ground = self._cell, self._ground
        await self._until(lambda: all((ground.aim / f"reached-{rank}").exists() for rank in cell.aimed))
        await self._until(lambda: all(ground.rank_pid(rank) for rank in range(NUM_RANKS)))
        struck_at = time.monotonic()
        orders = await getattr(self, "_" + cell.fault.replace(" ", "_").replace("-", "_").lower())()
        for rank in cell.aimed:
            (ground.aim / f"order-{rank}").write_text((orders or {}).get(rank, "go"))
        return struck_at

    async def _until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(CELL_SECONDS):
            while not reached():
                if self._task.done():
                    job = self._task.result().job
                    words = job.status.message if job is not None else "it is gone"
                    raise MomentMissedError(f"the run was over before its moment: {words}")
                await asyncio.sleep(POLL_SECONDS)

    # -- who ----------------------------------------------------------------------------------------------------------

    @property
    def _ranks(self) -> list[int]:
        pids = [self._ground.rank_pid(rank) for rank in self._cell.victims]
        return [pid for pid in pids if pid]

    @property
    def _supervisors(self) -> list[int]:
        pods = [self._pod(rank) for rank in self._cell.victims]
        return [pod.processes.container.pid for pod in pods if pod is not None and pod.processes is not None]

    def _pod(self, rank: int) -> Any:
        run = self._ground.run
        assert run is not None
        assert run.cluster is not None
        return run.cluster.kubelet.get(pod_name("matrix", 1, rank))

    @property
    def _kubelet(self) -> Any:
        run = self._ground.run
        assert run is not None
        assert run.cluster is not None
        return run.cluster.kubelet

    @property
    def _hits_supervisor(self) -> bool:
        return self._cell.target == "supervisor"

    # -- the faults ---------------------------------------------------------------------------------------------------

    async def _notice(self) -> None:
        """The machine is announced to go; at the supervisor: SIGTERM to it, from nobody that says why."""
        if self._hits_supervisor:
            faults.signal_all(self._supervisors, signal.SIGTERM)
            return
        for rank in self._cell.victims:
            await self._kubelet.preempt(pod_name("matrix", 1, rank), "TerminationByKubelet", SHUTDOWN_MESSAGE)

    async def _sigkill(self) -> None:
        """The process is gone; with all: the machines are."""
        if self._cell.target == "all":
            for rank in self._cell.victims:
                await self._kubelet.kill_pod(pod_name("matrix", 1, rank))
        else:
            faults.signal_all(self._supervisors if self._hits_supervisor else self._ranks, signal.SIGKILL)

    async def _hang(self) -> None:
        """Stopped for good."""
        faults.signal_all(self._supervisors if self._hits_supervisor else self._ranks, signal.SIGSTOP)

    async def _memory(self) -> Mapping[int, str] | None:
        """A rank asks for more than it may have; a supervisor meets the kernel's OOM killer."""
        if not self._hits_supervisor:
            return dict.fromkeys(self._cell.victims, "memory")
        for pid in self._supervisors:
            self._watch.on_end.append(faults.starve(pid, f"kill-matrix-{pid}"))
        return None

    async def _exit_1(self) -> Mapping[int, str] | None:
        """The program leaves with 1."""
        if not self._hits_supervisor:
            return dict.fromkeys(self._cell.victims, "exit")
        faults.signal_all(self._supervisors, signal.SIGUSR2)
        return None

    async def _full_disk(self) -> None:
        """No room on the shared storage; for rank 1 alone a limit; for the supervisor on the disk of its own files."""
        if self._cell.target == "rank 1":
            for pid in self._ranks:
                faults.forbid_writes(pid)
            return
        assert self._ground.disk is not None
        self._ground.disk.fill()
        self._heal_later()

    async def _read_only(self) -> None:
        """A disk that takes no more writes; for rank 1 alone in its own view of it."""
        if self._cell.target == "rank 1":
            for pid in self._ranks:
                faults.mount_private_read_only(pid, self._ground.shared)
            return
        assert self._ground.disk is not None
        self._ground.disk.make_read_only()
        self._heal_later()

    async def _partition(self) -> None:
        """Ranks that no packet of their peers reaches; a supervisor that reaches no coordinator, for a while."""
        if not self._hits_supervisor:
            for pid in self._ranks:
                faults.cut_off(pid)
        if self._cell.target in {"supervisor", "all"}:
            for rank in self._cell.victims:
                proxy = self._ground.proxies[rank]
                proxy.freeze()
                asyncio.get_running_loop().call_later(HEAL_SECONDS, proxy.thaw)

    def _heal_later(self) -> None:
        assert self._ground.disk is not None
        heal = self._ground.disk.heal
        if not self._cell.stays:
            # Training outlives a disk that takes nothing for a while. An attempt that has not begun to train does not:
            # the next one finds the disk mended.
            self._watch.on_end.append(heal)
            asyncio.get_running_loop().call_later(HEAL_SECONDS, heal)


def median(values: list[float]) -> float | None:
    """Median, rounded to tenths; None of nothing."""
    return round(statistics.median(values), 1) if values else None
