"""What must hold whatever happens, looked at in the moment in which it could break."""

from __future__ import annotations

from collections import Counter

from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJob, FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.types import ObservedPod, PodPhase
from finetune_operator.plan.model.view import members_of
from testing.simulated.model import BrokenInvariantError, SimPod
from testing.simulated.world import World

FINISHED = (Phase.SUCCEEDED, Phase.FAILED)
ENDED = (PodPhase.SUCCEEDED, PodPhase.FAILED)


class Invariants:
    """The watchdog of a world; raises BrokenInvariantError."""

    def __init__(self) -> None:
        self.world: World
        self.counts: Counter[str] = Counter()
        self._committed: dict[str, tuple[int, int]] = {}

    # -- told by the simulation ---------------------------------------------------------------------------------------

    def status_written(self, job: FineTuneJob, new: FineTuneJobStatus) -> None:
        """No number falls, budgets are honoured, what is over stays over, and every state has its reason."""
        old, name = job.status, job.metadata.name
        self.counts["status writes"] += 1
        self._require(new != old, name, "a status was written that says nothing new")
        self._require(new.attempt >= old.attempt, name, "the attempt fell")
        self._require(new.preemptions >= old.preemptions, name, "the preemptions fell")
        ends_before = old.preemptions + old.failures
        self._require(new.preemptions + new.failures >= ends_before, name, "the preemptions and failures fell")
        if new.failures < old.failures:
            self.counts["failures put right"] += 1
        self._require(new.lost_steps >= old.lost_steps, name, "the lost steps fell")
        self._require(bool(new.phase and new.reason and new.message is not None), name, "no phase, reason or message")
        ends = new.preemptions + new.failures
        self._require(ends <= new.attempt, name, f"{ends} ends of {new.attempt} attempts: one was counted twice")
        self._check_checkpoint(old, new, name)
        self._check_budget(job, new)
        if old.phase in FINISHED:
            self._require(new.phase is old.phase, name, f"it was {old.phase} and is {new.phase}")
        if new.attempt > old.attempt:
            if new.attempts[-1].nodes:
                self.counts["attempts of fewer nodes"] += 1
            self.counts["attempts in place" if new.attempts[-1].pod_attempts else "attempts of a whole gang"] += 1

    def pod_created(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """Only of the newest attempt, no more than asked for, and beside none of an older one."""
        self.counts["pods"] += 1
        name = job.metadata.name
        self._require(pod.attempt == job.status.attempt, name, f"{pod.name} is not of attempt {job.status.attempt}")
        self._require(job.status.phase not in FINISHED, name, f"{pod.name} was made after the end")
        living = [other.seen for other in self.world.server.pods.values() if other.job == name and self._counts(other)]
        asked = job.spec.topology.nodes or job.spec.topology.max_nodes or 1
        # Each pod that fell back from spot may have one beside it that waits for a spot node to take over.
        allowed = asked + sum(other.fell_back for other in living)
        names = [other.name for other in living]
        self._require(len(living) <= allowed, name, f"{len(living)} pods instead of {allowed}: {names}")
        members = set(members_of(job.status, job.spec))
        self._require(len(members) == (job.status.attempts[-1].nodes or asked), name, f"members {members}")
        gang = [other for other in living if (other.attempt, other.node_rank) in members]
        self._require(len(gang) <= asked, name, f"{len(gang)} pods in the gang instead of {asked}: {names}")
        least = job.spec.topology.min_nodes or asked
        self._require(least <= len(members) <= asked, name, f"{len(members)} nodes, not {least} to {asked}")

    def pod_deleted(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """The operator ends no pod of an attempt that is at work."""
        entry = job.status.attempts[-1] if job.status.attempts else None
        gang = members_of(job.status, job.spec)
        at_work = entry is not None and entry.ended_at is None and (pod.attempt, pod.node_rank) in gang
        self._require(
            not at_work or pod.deleted_at is not None or job.status.phase in FINISHED,
            job.metadata.name,
            f"{pod.name} was deleted while its attempt was at work",
        )

    def committed(self, job_name: str, attempt: int, step: int) -> None:
        """One attempt commits at a time, and the committed steps never fall."""
        self.counts["checkpoints"] += 1
        before = self._committed.get(job_name, (0, 0))
        self._require(
            attempt >= before[0], job_name, f"attempt {attempt} committed after attempt {before[0]} had committed"
        )
        self._require(step > before[1], job_name, f"step {step} was committed after step {before[1]}")
        self._committed[job_name] = (attempt, step)
        job = self.world.server.jobs.get(job_name)
        self._require(job is None or attempt <= job.status.attempt, job_name, f"attempt {attempt} is not known yet")

    # -- looked at by the driver --------------------------------------------------------------------------------------

    def all_ended(self, num_writes_before: int) -> None:
        """After a calm time every job has ended, and nothing is written any more."""
        for name, job in self.world.server.jobs.items():
            status = job.status
            self._require(status.phase in FINISHED, name, f"it never ended: {status.phase} {status.message}")
            if status.phase is Phase.SUCCEEDED:
                storage = self.world.server.storage[name]
                self._require(storage.step == storage.workload.total_steps, name, "it ended before its last step")
        num_writes = self.world.server.num_writes - num_writes_before
        self._require(num_writes == 0, "all", f"{num_writes} writes while nothing happened")

    # -- in detail ----------------------------------------------------------------------------------------------------

    def _counts(self, pod: SimPod) -> bool:
        """Whether a pod takes part: it is neither ended, nor on its way out, nor on a node that is out of reach."""

        reachable = pod.node is None or pod.node.connected
        return pod.seen.phase not in ENDED and pod.seen.deleted_at is None and reachable

    def _check_checkpoint(self, old: FineTuneJobStatus, new: FineTuneJobStatus, name: str) -> None:
        if new.last_checkpoint is None:
            self._require(old.last_checkpoint is None, name, "the last checkpoint is forgotten")
            return
        before = old.last_checkpoint.step if old.last_checkpoint else 0
        storage = self.world.server.storage[name]
        self._require(new.last_checkpoint.step >= before, name, "the last checkpoint fell back")
        self._require(new.last_checkpoint.step <= storage.step, name, "a checkpoint that does not exist")

    def _check_budget(self, job: FineTuneJob, new: FineTuneJobStatus) -> None:
        name, allowed = job.metadata.name, job.spec.recovery.max_failures
        caused = self.world.failures_caused[name]
        self._require(new.failures <= caused, name, f"{new.failures} failures counted, {caused} caused: {_ends(new)}")
        spent = new.tally.failures_since_checkpoint
        if new.phase is Phase.FAILED and new.reason == Reason.MAX_FAILURES_EXCEEDED:
            self._require(spent == allowed + 1, name, f"failed after {spent} failures, {allowed} are allowed")
        elif new.phase is not Phase.FAILED and new.attempts[-1].reason != Reason.FABRIC_ERROR:
            # After a lost peer, the last word is that of its node; nothing begins before that.
            self._require(spent <= allowed, name, f"goes on after {spent} failures, {allowed} are allowed")

    def _require(self, holds: bool, job: str, sentence: str) -> None:
        if not holds:
            raise BrokenInvariantError(f"job {job}: {sentence}")


def _ends(status: FineTuneJobStatus) -> str:
    return ", ".join(f"{entry.attempt}: {entry.reason}" for entry in status.attempts)
