"""The supervisors in the pods: they send heartbeats, follow the replies, and run one rank each.

They follow the contract: the same heartbeats, replies and exit codes as the real trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from signal import SIGTERM

from finetune_contract.exit_codes import HOLDABLE, ExitCode
from finetune_contract.heartbeat import (
    CommittedCheckpoint,
    GpuFault,
    Heartbeat,
    Order,
    RankEnd,
    RankReport,
    RankState,
    Reply,
    Termination,
)
from testing.simulated.engine import Engine
from testing.simulated.exporter import SimulatedExporter
from testing.simulated.gang import SimulatedGang
from testing.simulated.kubelet import Kubelets
from testing.simulated.model import SimulatedPod, SimulatedStorage, Watchdog

BEAT_SECONDS = 5.0
RECENT_REPLY_SECONDS = 60.0
"""A supervisor that received a reply within this time expects to receive a new world."""
HOLD_SECONDS = 120.0
END_STATES: dict[int, RankState] = {ExitCode.DONE: RankState.DONE, ExitCode.SAVED: RankState.SAVED}

# Heartbeats are changed copies of these: most of the cost of a new one would be its validation or its defaults.
_REPORT = RankReport(rank=0, state=RankState.LOADING)
_HEARTBEAT = Heartbeat(
    job="job", namespace="default", job_uid="uid", pod="pod", pod_uid="uid", attempt=1, node_rank=0, sequence=0
)

Post = Callable[["SimulatedSupervisor", Heartbeat], Reply | None]


class SimulatedSupervisor:
    """PID 1 of one pod, with one rank as its child process."""

    def __init__(self, trainers: Trainers, pod: SimulatedPod) -> None:
        self.pod = pod
        self.attempt = pod.observed.attempt
        self.node_rank = pod.observed.node_rank
        self.num_nodes = pod.num_nodes
        self.last_reply_at = -1e9
        self.gang: SimulatedGang | None = None
        self._trainers = trainers
        self._engine = trainers.engine
        self._storage = trainers.storage[pod.job]
        self._has_notice = False
        self._ends: tuple[RankEnd, ...] = ()
        self._gpu_faults: tuple[GpuFault, ...] = ()
        self._waiting = pod.is_standby
        self._joining = pod.must_join and not pod.is_standby
        """Whether its rank starts when the coordinator names the address of rank 0."""
        self._alive = True
        self._epoch = 0
        self._sequence = 0
        self._is_change_queued = False
        self._beat_seconds = BEAT_SECONDS
        self._num_timers = 0
        # A standby imports the libraries and reads the model's files while it waits.
        self._is_cold = not pod.is_standby
        pod.end = self._killed
        pod.notice = self._on_notice
        if pod.is_standby:
            # It waits as long as any supervisor that waits for a new world.
            self.last_reply_at = self._engine.time
        elif not self._joining:
            self._start_ranks()
        self._send_and_repeat()

    # -- signals and ends ---------------------------------------------------------------------------------------------

    def _on_notice(self) -> None:
        """Handle SIGTERM."""
        if not self._alive or self._has_notice:
            return
        self._has_notice = True
        self.send_soon()
        if self._waiting or self._joining:
            self._give_up()
        else:
            self._stop_ranks()

    def _stop_ranks(self) -> None:
        if not self._storage.workload.saves_on_notice:
            if self._has_notice:
                self._leave_gang(silent=False)
                self.rank_ended(128 + SIGTERM)
            return
        if self.gang is not None and self.gang.restored_step is not None:
            self.gang.stop()
        elif not self._ends:
            # There is nothing to save yet: the rank exits immediately.
            self._leave_gang(silent=False)
            self.rank_ended(ExitCode.SAVED)

    def fail(self, code: int, output: str, gpu_fault: GpuFault | None = None) -> None:
        """Let its rank fail by itself, or because of a fault of its GPU."""
        if gpu_fault is not None:
            self._gpu_faults = (gpu_fault,)
        if self._joining:
            # It has no rank that could fail, but a fault of a GPU ends it.
            if gpu_fault is not None:
                self._ends = (RankEnd.model_construct(rank=self.node_rank, exit_code=71, last_words=output),)
                self._end(ExitCode.DEVICE)
        elif self._alive and not self._ends:
            self._leave_gang(silent=False)
            self.rank_ended(code, output)

    def kill_container(self) -> None:
        """End it together with its rank, as the kernel does where it ends all processes of a container."""
        self._killed(137, "OOMKilled")

    def _killed(self, code: int, reason: str | None = None) -> None:
        """Handle SIGKILL, or the end of the node."""
        if self._alive:
            self._alive = False
            self._leave_gang(silent=code == -1)
            if code >= 0:
                self._trainers.kubelets.ended(self.pod, code, None, reason)
            self._trainers.forget(self)

    def rank_ended(self, code: int, output: str = "") -> None:
        """Handle the end of its rank: wait for a new world if the pod itself is healthy, otherwise exit."""
        if not self._alive or self._ends:
            return
        self._leave_gang(silent=False)
        self._ends = (RankEnd.model_construct(rank=self.node_rank, exit_code=code, last_words=output),)
        is_reachable = self._engine.time - self.last_reply_at < RECENT_REPLY_SECONDS
        self.send_soon()
        if code in HOLDABLE and is_reachable and not self._has_notice:
            self._waiting = True
        else:
            self._later(self._engine.rng.uniform(0.1, 3.0), partial(self._end, code))

    def _end(self, code: int) -> None:
        if not self._alive:
            return
        self._post()
        if not self._alive:
            return
        self._alive = False
        self._leave_gang(silent=False)
        termination = Termination(
            attempt=self.attempt,
            exit_code=code,
            notice=self._has_notice,
            ends=self._ends,
            gpu_faults=self._gpu_faults,
        )
        self._trainers.kubelets.ended(self.pod, code, termination)
        self._trainers.forget(self)

    # -- its rank -----------------------------------------------------------------------------------------------------

    def _start_ranks(self) -> None:
        self._epoch += 1
        self._ends = ()
        self._waiting = self._joining = False
        work = self._storage.workload
        seconds = work.load_seconds if self._is_cold or work.warm_load_seconds is None else work.warm_load_seconds
        self._is_cold = False
        self._later(self._engine.rng.uniform(0.5, 1.5) * seconds, self._join)

    def _join(self) -> None:
        self.gang = self._trainers.find_gang(self.pod.job, self.attempt, self.num_nodes)
        self.gang.join(self)

    def _leave_gang(self, *, silent: bool) -> None:
        gang, self.gang = self.gang, None
        if gang is not None:
            gang.leave(self, silent=silent)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        epoch = self._epoch

        def act() -> None:
            if epoch == self._epoch and self._alive:
                action()

        self._engine.after(seconds, act)

    # -- heartbeats ---------------------------------------------------------------------------------------------------

    def send_soon(self) -> None:
        """Send a heartbeat soon: something has changed."""
        if not self._is_change_queued and self._alive:
            self._is_change_queued = True
            self._engine.after(0.05, self._send_change)

    def _send_change(self) -> None:
        self._is_change_queued = False
        if self._alive:
            self._post()

    def _send_and_repeat(self) -> None:
        if self._alive:
            self._post()
            self._set_timer()
            if self._waiting and self._engine.time - self.last_reply_at > HOLD_SECONDS:
                self._give_up()

    def _set_timer(self) -> None:
        """Set the timer of the next heartbeat; an earlier timer is discarded."""
        self._num_timers += 1
        number = self._num_timers

        def send() -> None:
            if number == self._num_timers:
                self._send_and_repeat()

        self._engine.after(self._beat_seconds, send)

    def _give_up(self) -> None:
        self._end(self._ends[0].exit_code if self._ends else ExitCode.SAVED)

    def _post(self) -> None:
        self._sequence += 1
        reply = self._trainers.post(self, self._build_heartbeat())
        if reply is not None:
            self.last_reply_at = self._engine.time
            wanted = reply.beat_seconds or BEAT_SECONDS
            if self._alive and wanted != self._beat_seconds:
                self._beat_seconds = wanted
                self._set_timer()
            self._obey(reply)

    def _obey(self, reply: Reply) -> None:
        world = reply.world
        if world is not None and world.attempt > self.attempt - self._joining:
            if self._has_notice:
                return
            self._leave_gang(silent=False)
            self.attempt, self.node_rank, self.num_nodes = world.attempt, world.node_rank, world.num_nodes
            self._start_ranks()
        elif reply.attempt is not None and reply.attempt > self.attempt and not self._has_notice:
            self._has_notice = True
            self._joining = False
            self._leave_gang(silent=False)
            self._ends = self._ends or (RankEnd.model_construct(rank=self.node_rank, exit_code=77, last_words=""),)
            self._later(1.0, partial(self._end, ExitCode.SUPERSEDED))
        elif self._joining and not self._has_notice and (reply.peer_lost or reply.order is Order.SAVE_AND_STOP):
            self._joining, self._waiting = False, True
            self.send_soon()
        elif reply.order is Order.SAVE_AND_STOP and not self._ends and not self._waiting:
            self._stop_ranks()

    def _build_heartbeat(self) -> Heartbeat:
        gang, storage = self.gang, self._storage
        is_standby = self._waiting and not self._ends
        report = _REPORT.model_copy(
            update={
                "rank": self.node_rank,
                "state": self._state(),
                "step": gang.step if gang is not None and gang.restored_step is not None else None,
                "total_steps": storage.workload.total_steps if gang is not None else None,
                "restored_step": gang.restored_step if gang is not None else None,
                "checkpoint": self._checkpoint(),
            }
        )
        return _HEARTBEAT.model_copy(
            update={
                "job": self.pod.job,
                "job_uid": f"uid-{self.pod.job}",
                "pod": self.pod.observed.name,
                "pod_uid": self.pod.observed.uid,
                "attempt": self.attempt,
                "node_rank": self.node_rank,
                "sequence": self._sequence,
                "ranks": () if is_standby else (report,),
                "ends": self._ends,
                "notice": self._has_notice,
                "waiting": self._waiting,
                "joining": self._joining,
                "gpu_faults": self._gpu_faults,
            }
        )

    def _state(self) -> RankState:
        if self._ends:
            return END_STATES.get(self._ends[0].exit_code, RankState.FAILED)
        if self._joining:
            return RankState.STARTING
        return self.gang.state if self.gang is not None else RankState.LOADING

    def _checkpoint(self) -> CommittedCheckpoint | None:
        storage = self._storage
        if self.node_rank != 0 or storage.step == 0 or self.gang is None or self.gang.restored_step is None:
            return None
        skew = self.pod.node.skew_seconds if self.pod.node is not None else 0.0
        return CommittedCheckpoint.model_construct(
            step=storage.step, time=self._engine.now(skew).timestamp(), size_bytes=1000, attempt=storage.attempt
        )


class Trainers:
    """All supervisors and gangs of the cluster."""

    def __init__(self, engine: Engine, storage: dict[str, SimulatedStorage], watchdog: Watchdog, post: Post) -> None:
        self.engine = engine
        self.storage = storage
        self.watchdog = watchdog
        self.post = post
        self.supervisors: dict[str, SimulatedSupervisor] = {}
        """Running ones, by the UID of their pod."""
        self._gangs: dict[str, SimulatedGang] = {}
        self.kubelets: Kubelets

    def start(self, pod: SimulatedPod) -> None:
        """Start the supervisor of a pod, or the process of an export pod."""
        if pod.observed.export is not None:
            SimulatedExporter(self.engine, self.kubelets, pod, self.storage[pod.job].workload.export_seconds)
            return
        self.supervisors[pod.observed.uid] = SimulatedSupervisor(self, pod)

    def forget(self, supervisor: SimulatedSupervisor) -> None:
        """Remove a supervisor that has ended."""
        self.supervisors.pop(supervisor.pod.observed.uid, None)

    def find_gang(self, job: str, attempt: int, size: int) -> SimulatedGang:
        """Return the gang that the ranks of an attempt join; a superseded attempt gets a separate one."""
        gang = self._gangs.get(job)
        if gang is None or gang.attempt < attempt:
            gang = self._gangs[job] = self._new_gang(job, attempt, size)
        if gang.attempt > attempt:
            return self._new_gang(job, attempt, size)
        return gang

    def of_job(self, job: str) -> list[SimulatedSupervisor]:
        """Return the running supervisors of a job."""
        return [supervisor for supervisor in self.supervisors.values() if supervisor.pod.job == job]

    def _new_gang(self, job: str, attempt: int, size: int) -> SimulatedGang:
        return SimulatedGang(self.engine, self.storage[job], self.watchdog, job, attempt=attempt, size=size)
