"""The ranks of an attempt as one state machine: they load, restore, train, save, export, and lose their peers.

Its steps cost no events: the number of finished steps follows from the time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState
from finetune_contract.timeouts import COLLECTIVE_TIMEOUT
from testing.simulated.engine import Engine
from testing.simulated.model import BrokenInvariantError, SimulatedStorage, Watchdog

COLLECTIVE_TIMEOUT_SECONDS = 900.0
"""Time after which a collective with a silent peer times out."""
RENDEZVOUS_SECONDS = COLLECTIVE_TIMEOUT.total_seconds()
"""Time after which a rank stops waiting for the others to join."""
LOUD_SECONDS = (0.05, 2.0)
"""Range of the time until a rank notices that the connection to its peer is closed."""


class GangMember(Protocol):
    """A rank of the gang: the supervisor that runs it."""

    node_rank: int

    def rank_ended(self, code: int, output: str = "") -> None:
        """Handle the end of the rank."""
        ...

    def fail(self, code: int, output: str) -> None:
        """Let the rank fail by itself."""
        ...

    def send_soon(self) -> None:
        """Send a heartbeat soon: something has changed."""
        ...


class SimulatedGang:
    """The ranks of one attempt, from their rendezvous on."""

    def __init__(
        self, engine: Engine, storage: SimulatedStorage, watchdog: Watchdog, job: str, *, attempt: int, size: int
    ) -> None:
        self.attempt = attempt
        self.size = size
        self.members: dict[int, GangMember] = {}
        self.state = RankState.LOADING
        self.restored_step: int | None = None
        self.stopping = False
        self.hung_step: int | None = None
        """Step at which it hangs; None: it does not hang."""
        self._job = job
        self._engine = engine
        self._storage = storage
        self._watchdog = watchdog
        self._from_step = 0
        self._from_time = 0.0
        self._until_step = 0
        self._step_seconds = 0.0
        """Duration of a step until the next save."""
        self._epoch = 0
        """Increases with every change of course; actions planned in an earlier epoch are discarded."""
        self.broken = False

    @property
    def step(self) -> int:
        """The number of finished steps."""
        if self.hung_step is not None:
            return self.hung_step
        if self.state is not RankState.TRAINING:
            return self._from_step
        elapsed = (self._engine.time - self._from_time) / self._step_seconds
        return min(self._until_step, self._from_step + int(elapsed + 1e-6))

    def join(self, member: GangMember) -> None:
        """Add a rank; the last one starts the gang."""
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

    def _give_up(self, member: GangMember) -> None:
        """End a rank that has waited too long for the others."""
        if self.members.get(member.node_rank) is member and self.state is RankState.LOADING and not self.broken:
            self._exit(member, ExitCode.FABRIC, "could not meet the others")

    def leave(self, member: GangMember, *, silent: bool) -> None:
        """Remove a rank. The others notice a closed connection, or time out much later if the loss is silent."""
        if self.members.get(member.node_rank) is not member:
            return
        del self.members[member.node_rank]
        if not self.broken:
            step = self.step
            self._storage.num_trained += step - self._from_step
            self._from_step = self._until_step = step
        self.broken = True
        self._epoch += 1
        for other in list(self.members.values()):
            low, high = LOUD_SECONDS
            delay = COLLECTIVE_TIMEOUT_SECONDS if silent else self._engine.rng.uniform(low, high)
            self._engine.after(delay, partial(self._lost_peer, other))

    def _lost_peer(self, member: GangMember) -> None:
        if self.members.get(member.node_rank) is member:
            self._emergency_save()
            self._exit(member, ExitCode.FABRIC, "lost a peer")

    def _emergency_save(self) -> None:
        """Let the first survivor save the step that all have finished."""
        storage = self._storage
        unsaved = self.restored_step is not None and self._from_step > storage.step
        if storage.workload.emergency_saves and unsaved and storage.commit(self.attempt, self._from_step):
            self._watchdog.committed(self._job, self.attempt, self._from_step)

    def _exit(self, member: GangMember, code: int, output: str = "") -> None:
        member.rank_ended(code, output)

    def stop(self) -> None:
        """Stop the gang: all ranks finish their current step, save, and exit."""
        if self.stopping or self.broken or self.hung_step is not None:
            return
        self.stopping = True
        if self.state is RankState.TRAINING:
            self._advance_to(min(self._until_step, self.step + 1))

    def hang(self) -> None:
        """Let the ranks wait for each other forever."""
        self.hung_step = self.step
        self._epoch += 1

    # -- the course of the training -----------------------------------------------------------------------------------

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
        self._step_seconds = work.step_seconds * (work.full_size or self.size) / self.size
        next_save = (self._from_step // work.save_steps + 1) * work.save_steps
        self._advance_to(min(next_save, work.total_steps))

    def _advance_to(self, step: int) -> None:
        self._epoch += 1
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
            self._engine.after(work.save_seconds, partial(self._commit_in_background, self._from_step))
            self._later(min(work.stall_seconds, work.save_seconds), self._resume)
            return
        self._later(work.save_seconds if is_new else 0.0, self._saved)

    def _commit_in_background(self, step: int) -> None:
        """Commit an asynchronous save."""
        if not self.broken and step > self._storage.step and self._storage.commit(self.attempt, step):
            self._watchdog.committed(self._job, self.attempt, step)

    def _resume(self) -> None:
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
            self._watchdog.committed(self._job, self.attempt, self._from_step)
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
        self._epoch += 1
        for member in members:
            member.rank_ended(code)

    def _enter(self, state: RankState) -> None:
        self.state = state
        for member in self.members.values():
            member.send_soon()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        epoch = self._epoch

        def act() -> None:
            if epoch == self._epoch:
                action()

        self._engine.after(seconds, act)
