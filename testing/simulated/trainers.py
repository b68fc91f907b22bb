"""What runs in the pods: supervisors that beat and obey, and gangs that step, save and lose their peers.

A gang's steps cost no events: how far it is follows from the time. It speaks the contract: the same beats, replies and
exit codes as the real trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from signal import SIGTERM

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import (
    CommittedCheckpoint,
    Heartbeat,
    Order,
    RankEnd,
    RankReport,
    RankState,
    Reply,
    Termination,
)
from finetune_contract.timeouts import COLLECTIVE_TIMEOUT
from testing.simulated.engine import Engine
from testing.simulated.kubelet import Kubelets
from testing.simulated.model import BrokenInvariantError, SimPod, Storage, Watchdog

BEAT_SECONDS = 5.0
HEARD_SECONDS = 60.0
"""A supervisor that was answered within this time trusts that it will be told of a new world."""
HOLD_SECONDS = 120.0
COLLECTIVE_TIMEOUT_SECONDS = 900.0
"""A rank that waits for a peer that fell silent gives up after so long."""
RENDEZVOUS_SECONDS = COLLECTIVE_TIMEOUT.total_seconds()
"""A rank that the others do not come to gives up after so long."""
HOLDING = frozenset({ExitCode.FABRIC, ExitCode.SAVED})
"""Ends of ranks after which a supervisor can wait for a new world: their pod itself is well."""
END_STATES: dict[int, RankState] = {ExitCode.DONE: RankState.DONE, ExitCode.SAVED: RankState.SAVED}
LOUD_SECONDS = (0.05, 2.0)
"""How soon a rank sees that the connection to its peer is closed."""

Post = Callable[["Supervisor", Heartbeat], Reply | None]


class Gang:
    """The ranks of one attempt, once they have found each other."""

    def __init__(self, trainers: Trainers, job: str, attempt: int, size: int) -> None:
        self.attempt = attempt
        self.size = size
        self.members: dict[int, Supervisor] = {}
        self.state = RankState.LOADING
        self.restored_step: int | None = None
        self.stopping = False
        self.hung_step: int | None = None
        """Where it stands still without an end."""
        self._job = job
        self._trainers = trainers
        self._engine = trainers.engine
        self._storage = trainers.storage[job]
        self._from_step = 0
        self._from_time = 0.0
        self._until_step = 0
        self._life = 0
        """Rises with every change of plans; what was planned before comes to nothing."""
        self.broken = False

    @property
    def _step_seconds(self) -> float:
        work = self._storage.workload
        return work.step_seconds * (work.full_size or self.size) / self.size

    @property
    def step(self) -> int:
        """Finished steps."""
        if self.hung_step is not None:
            return self.hung_step
        if self.state is not RankState.TRAINING:
            return self._from_step
        elapsed = (self._engine.time - self._from_time) / self._step_seconds
        return min(self._until_step, self._from_step + int(elapsed + 1e-6))

    def join(self, member: Supervisor) -> None:
        """A rank comes; the last one lets them begin."""
        if member.node_rank in self.members:
            raise BrokenInvariantError(f"{self._job}: two pods are rank {member.node_rank} of attempt {self.attempt}")
        self.members[member.node_rank] = member
        if len(self.members) == self.size and not self.broken:
            if not self._storage.mark(self.attempt):
                self._exit(self.members[0], ExitCode.SUPERSEDED)
                return
            self._enter(RankState.RESTORING)
            self._later(self._storage.workload.restore_seconds, self._restored)
        else:
            self._engine.after(RENDEZVOUS_SECONDS, partial(self._give_up, member))

    def _give_up(self, member: Supervisor) -> None:
        """A rank that has waited too long for the others."""
        if self.members.get(member.node_rank) is member and self.state is RankState.LOADING and not self.broken:
            self._exit(member, ExitCode.FABRIC, "could not meet the others")

    def leave(self, member: Supervisor, *, silent: bool) -> None:
        """A rank is gone. The others see a closed connection, or nothing for a long time."""
        if self.members.get(member.node_rank) is not member:
            return
        del self.members[member.node_rank]
        if not self.broken:
            step = self.step
            self._storage.num_trained += step - self._from_step
            self._from_step = self._until_step = step
        self.broken = True
        self._life += 1
        for other in list(self.members.values()):
            low, high = LOUD_SECONDS
            delay = COLLECTIVE_TIMEOUT_SECONDS if silent else self._engine.rng.uniform(low, high)
            self._engine.after(delay, partial(self._lost_peer, other))

    def _lost_peer(self, member: Supervisor) -> None:
        if self.members.get(member.node_rank) is member:
            self._rescue()
            self._exit(member, ExitCode.FABRIC, "lost a peer")

    def _rescue(self) -> None:
        """The first of the survivors saves the step that all have finished."""
        storage = self._storage
        unsaved = self.restored_step is not None and self._from_step > storage.step
        if storage.workload.rescues and unsaved and storage.commit(self.attempt, self._from_step):
            self._trainers.watchdog.committed(self._job, self.attempt, self._from_step)

    def _exit(self, member: Supervisor, code: int, words: str = "") -> None:
        member.rank_ended(code, words)

    def stop(self) -> None:
        """A rank has been told to stop: all finish the step that they are in, save, and leave."""
        if self.stopping or self.broken or self.hung_step is not None:
            return
        self.stopping = True
        if self.state is RankState.TRAINING:
            self._advance_to(min(self._until_step, self.step + 1))

    def hang(self) -> None:
        """Ranks wait for each other for ever."""
        self.hung_step = self.step
        self._life += 1

    # -- its own course -----------------------------------------------------------------------------------------------

    def _restored(self) -> None:
        self.restored_step = self._from_step = self._storage.step
        self._enter(RankState.TRAINING)
        self._train()

    def _train(self) -> None:
        work = self._storage.workload
        if self.stopping or self._from_step >= work.total_steps:
            self._save()
            return
        self._from_time = self._engine.time
        next_save = (self._from_step // work.save_steps + 1) * work.save_steps
        self._advance_to(min(next_save, work.total_steps))

    def _advance_to(self, step: int) -> None:
        self._life += 1
        self._until_step = step
        due = self._from_time + (step - self._from_step) * self._step_seconds
        self._later(max(0.0, due - self._engine.time), partial(self._reached, step))

    def _reached(self, step: int) -> None:
        self._storage.num_trained += step - self._from_step
        self._from_step = step
        self._save()

    def _save(self) -> None:
        self._enter(RankState.SAVING)
        work, is_new = self._storage.workload, self._from_step > self._storage.step
        if work.stall_seconds is not None and is_new and not self.stopping and self._from_step < work.total_steps:
            self._engine.after(work.save_seconds, partial(self._commit_beside, self._from_step))
            self._later(min(work.stall_seconds, work.save_seconds), self._go_on)
            return
        self._later(work.save_seconds if is_new else 0.0, self._saved)

    def _commit_beside(self, step: int) -> None:
        """A save that went on beside the steps is over."""
        if not self.broken and step > self._storage.step and self._storage.commit(self.attempt, step):
            self._trainers.watchdog.committed(self._job, self.attempt, step)

    def _go_on(self) -> None:
        if self.stopping:
            self._save()
            return
        self._enter(RankState.TRAINING)
        self._train()

    def _saved(self) -> None:
        if self._from_step > self._storage.step:
            if not self._storage.commit(self.attempt, self._from_step):
                self._exit(self.members[0], ExitCode.SUPERSEDED)
                return
            self._trainers.watchdog.committed(self._job, self.attempt, self._from_step)
        if self._from_step >= self._storage.workload.total_steps:
            self._enter(RankState.EXPORTING)
            self._later(self._storage.workload.export_seconds, partial(self._all_end, ExitCode.DONE))
        elif self.stopping:
            self._all_end(ExitCode.SAVED)
        else:
            self._enter(RankState.TRAINING)
            self._train()

    def _all_end(self, code: int) -> None:
        members = list(self.members.values())
        self.members.clear()
        self.broken = True
        self._life += 1
        for member in members:
            member.rank_ended(code)

    def _enter(self, state: RankState) -> None:
        self.state = state
        for member in self.members.values():
            member.beat_soon()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        life = self._life

        def act() -> None:
            if life == self._life:
                action()

        self._engine.after(seconds, act)


class Supervisor:
    """PID 1 of one pod, with one rank below it."""

    def __init__(self, trainers: Trainers, pod: SimPod) -> None:
        self.pod = pod
        self.attempt = pod.seen.attempt
        self.node_rank = pod.seen.node_rank
        self.num_nodes = pod.num_nodes
        self.heard_at = -1e9
        self.gang: Gang | None = None
        self._trainers = trainers
        self._engine = trainers.engine
        self._storage = trainers.storage[pod.job]
        self._noticed = False
        self._ends: tuple[RankEnd, ...] = ()
        self._waiting = pod.stands_by
        self._alive = True
        self._life = 0
        self._sequence = 0
        self._soon = False
        self._beat_seconds = BEAT_SECONDS
        self._num_timers = 0
        # One that stands by imports the libraries and reads the model's files meanwhile.
        self._is_cold = not pod.stands_by
        pod.end = self._killed
        pod.notice = self._on_notice
        if pod.stands_by:
            # It has as long as any that waits for a new world.
            self.heard_at = self._engine.time
        else:
            self._start_ranks()
        self._beat_again()

    # -- what happens to it -------------------------------------------------------------------------------------------

    def _on_notice(self) -> None:
        """SIGTERM."""
        if not self._alive or self._noticed:
            return
        self._noticed = True
        self.beat_soon()
        if self._waiting:
            self._give_up()
        else:
            self._stop_ranks()

    def _stop_ranks(self) -> None:
        if not self._storage.workload.saves_on_notice:
            if self._noticed:
                self._leave_gang(silent=False)
                self.rank_ended(128 + SIGTERM)
            return
        if self.gang is not None and self.gang.restored_step is not None:
            self.gang.stop()
        elif not self._ends:
            # Nothing to save yet: the rank leaves at once.
            self._leave_gang(silent=False)
            self.rank_ended(ExitCode.SAVED)

    def fail(self, code: int, words: str, reason: str | None = None) -> None:
        """Its rank fails by itself."""
        if self._alive and not self._ends:
            self._leave_gang(silent=False)
            self.rank_ended(code, words, reason)

    def _killed(self, code: int) -> None:
        """SIGKILL, or the end of the machine."""
        if self._alive:
            self._alive = False
            self._leave_gang(silent=code == -1)
            if code >= 0:
                self._trainers.kubelets.ended(self.pod, code, None)
            self._trainers.forget(self)

    def rank_ended(self, code: int, words: str = "", reason: str | None = None) -> None:
        """Its rank is gone; where the pod itself is well, it waits for a new world."""
        if not self._alive or self._ends:
            return
        self._leave_gang(silent=False)
        self._ends = (RankEnd.model_construct(rank=self.node_rank, exit_code=code, last_words=words),)
        heard = self._engine.time - self.heard_at < HEARD_SECONDS
        self.beat_soon()
        if code in HOLDING and heard and not self._noticed:
            self._waiting = True
        else:
            self._later(self._engine.rng.uniform(0.1, 3.0), partial(self._end, code, reason))

    def _end(self, code: int, reason: str | None = None) -> None:
        if not self._alive:
            return
        self._post()
        if not self._alive:
            return
        self._alive = False
        self._leave_gang(silent=False)
        termination = Termination(attempt=self.attempt, exit_code=code, notice=self._noticed, ends=self._ends)
        self._trainers.kubelets.ended(self.pod, code, termination, reason)
        self._trainers.forget(self)

    # -- its ranks ----------------------------------------------------------------------------------------------------

    def _start_ranks(self) -> None:
        self._life += 1
        self._ends = ()
        self._waiting = False
        work = self._storage.workload
        seconds = work.load_seconds if self._is_cold or work.warm_load_seconds is None else work.warm_load_seconds
        self._is_cold = False
        self._later(self._engine.rng.uniform(0.5, 1.5) * seconds, self._join)

    def _join(self) -> None:
        self.gang = self._trainers.gang(self.pod.job, self.attempt, self.num_nodes)
        self.gang.join(self)

    def _leave_gang(self, *, silent: bool) -> None:
        gang, self.gang = self.gang, None
        if gang is not None:
            gang.leave(self, silent=silent)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        life = self._life

        def act() -> None:
            if life == self._life and self._alive:
                action()

        self._engine.after(seconds, act)

    # -- its beats ----------------------------------------------------------------------------------------------------

    def beat_soon(self) -> None:
        """Something changed."""
        if not self._soon and self._alive:
            self._soon = True
            self._engine.after(0.05, self._beat_changed)

    def _beat_changed(self) -> None:
        self._soon = False
        if self._alive:
            self._post()

    def _beat_again(self) -> None:
        if self._alive:
            self._post()
            self._set_timer()
            if self._waiting and self._engine.time - self.heard_at > HOLD_SECONDS:
                self._give_up()

    def _set_timer(self) -> None:
        """Beat after a while; an earlier timer comes to nothing."""
        self._num_timers += 1
        number = self._num_timers

        def beat() -> None:
            if number == self._num_timers:
                self._beat_again()

        self._engine.after(self._beat_seconds, beat)

    def _give_up(self) -> None:
        self._end(self._ends[0].exit_code if self._ends else ExitCode.SAVED)

    def _post(self) -> None:
        self._sequence += 1
        reply = self._trainers.post(self, self._beat())
        if reply is not None:
            self.heard_at = self._engine.time
            wanted = reply.beat_seconds or BEAT_SECONDS
            if self._alive and wanted != self._beat_seconds:
                self._beat_seconds = wanted
                self._set_timer()
            self._obey(reply)

    def _obey(self, reply: Reply) -> None:
        world = reply.world
        if world is not None and world.attempt > self.attempt:
            if self._noticed:
                return
            self._leave_gang(silent=False)
            self.attempt, self.node_rank, self.num_nodes = world.attempt, world.node_rank, world.num_nodes
            self._start_ranks()
        elif reply.attempt is not None and reply.attempt > self.attempt and not self._noticed:
            self._noticed = True
            self._leave_gang(silent=False)
            self._ends = self._ends or (RankEnd.model_construct(rank=self.node_rank, exit_code=77, last_words=""),)
            self._later(1.0, partial(self._end, ExitCode.SUPERSEDED))
        elif reply.order is Order.SAVE_AND_STOP and not self._ends and not self._waiting:
            self._stop_ranks()

    def _beat(self) -> Heartbeat:
        # Built without a look at each field, which is the larger part of what a beat costs.
        gang, storage = self.gang, self._storage
        stands_by = self._waiting and not self._ends
        report = RankReport.model_construct(
            rank=self.node_rank,
            state=self._state(),
            step=gang.step if gang is not None and gang.restored_step is not None else None,
            total_steps=storage.workload.total_steps if gang is not None else None,
            restored_step=gang.restored_step if gang is not None else None,
            loss=None,
            images_per_second=None,
            checkpoint=self._checkpoint(),
            detail=None,
            warnings=(),
            outputs=(),
        )
        return Heartbeat.model_construct(
            job=self.pod.job,
            namespace="default",
            job_uid=f"uid-{self.pod.job}",
            pod=self.pod.seen.name,
            pod_uid=self.pod.seen.uid,
            attempt=self.attempt,
            node_rank=self.node_rank,
            sequence=self._sequence,
            ranks=() if stands_by else (report,),
            ends=self._ends,
            notice=self._noticed,
            waiting=self._waiting,
        )

    def _state(self) -> RankState:
        if self._ends:
            return END_STATES.get(self._ends[0].exit_code, RankState.FAILED)
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
    """All supervisors and gangs."""

    def __init__(self, engine: Engine, storage: dict[str, Storage], watchdog: Watchdog, post: Post) -> None:
        self.engine = engine
        self.storage = storage
        self.watchdog = watchdog
        self.post = post
        self.supervisors: dict[str, Supervisor] = {}
        """Living ones, by the UID of their pod."""
        self._gangs: dict[str, Gang] = {}
        self.kubelets: Kubelets

    def start(self, pod: SimPod) -> None:
        """A pod's container starts."""
        self.supervisors[pod.seen.uid] = Supervisor(self, pod)

    def forget(self, supervisor: Supervisor) -> None:
        """A supervisor has ended."""
        self.supervisors.pop(supervisor.pod.seen.uid, None)

    def gang(self, job: str, attempt: int, size: int) -> Gang:
        """Where the ranks of an attempt meet."""
        gang = self._gangs.get(job)
        if gang is None or gang.attempt < attempt:
            gang = self._gangs[job] = Gang(self, job, attempt, size)
        if gang.attempt > attempt:
            return Gang(self, job, attempt, size)
        return gang

    def of(self, job: str) -> list[Supervisor]:
        """The living supervisors of a job."""
        return [supervisor for supervisor in self.supervisors.values() if supervisor.pod.job == job]
