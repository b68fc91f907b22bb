"""The invariants of the simulation, each checked at the moment at which it could break."""

from __future__ import annotations

from collections import Counter

from finetune_contract.heartbeat import OutputState
from finetune_contract.phase import FINISHED, Phase
from finetune_operator.api.gangs import POD_GROUP
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.quantity import parse_quantity
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.types import ObservedPod, PodPhase
from finetune_operator.plan.model.view import members_of
from testing.simulated.cluster import SimulatedCluster
from testing.simulated.model import BrokenInvariantError, SimulatedPod

DELETION_SECONDS = 3600.0
"""Time after the deletion of a Workload in which its pods may still be created: watches may be interrupted."""
ENDED = (PodPhase.SUCCEEDED, PodPhase.FAILED)


class Invariants:
    """The watchdog of a cluster. Raises BrokenInvariantError."""

    def __init__(self) -> None:
        self.cluster: SimulatedCluster
        self.counts: Counter[str] = Counter()
        self._committed: dict[str, tuple[int, int]] = {}

    # -- called by the simulation -------------------------------------------------------------------------------------

    def status_written(self, job: FineTuneJob, new: FineTuneJobStatus) -> None:
        """Counters never decrease, budgets are kept, a finished job stays finished, and every state has a reason."""
        old, name = job.status, job.metadata.name
        self.counts["status writes"] += 1
        self._require(new != old, name, "a status was written without a change")
        self._require(new.attempt >= old.attempt, name, "the attempt number decreased")
        self._require(new.preemptions >= old.preemptions, name, "the number of preemptions decreased")
        ends_before = old.preemptions + old.failures
        self._require(
            new.preemptions + new.failures >= ends_before, name, "the number of preemptions and failures decreased"
        )
        if new.failures < old.failures:
            self.counts["reclassified failures"] += 1
        self._require(new.lost_steps >= old.lost_steps, name, "the number of lost steps decreased")
        self._require(
            bool(new.phase and new.reason and new.message is not None), name, "phase, reason or message is missing"
        )
        ends = new.preemptions + new.failures
        self._require(ends <= new.attempt, name, f"{ends} ends were counted for {new.attempt} attempts")
        self._check_checkpoint(old, new, name)
        self._check_budget(job, new)
        if old.phase in FINISHED:
            self._require(new.phase is old.phase, name, f"its phase changed from {old.phase} to {new.phase}")
        self._check_end(old, new, name)
        if new.memory != old.memory:
            self.counts["memory raised"] += 1
        if new.attempt > old.attempt:
            if job.spec.queue_name is not None:
                self.counts["attempts after an admission"] += 1
            self.counts[f"attempts scheduled with {new.attempts[-1].scheduling}"] += 1
            if new.attempts[-1].nodes:
                self.counts["attempts on fewer nodes"] += 1
            self.counts["attempts in place" if new.attempts[-1].pod_attempts else "attempts of a new gang"] += 1

    def pod_created(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """A created pod belongs to the newest attempt, and the number of pods never exceeds the requested one."""
        self.counts["pods"] += 1
        name = job.metadata.name
        if pod.export is not None:
            self._check_export(job, pod)
            return
        self._require(
            pod.attempt == job.status.attempt, name, f"{pod.name} does not belong to attempt {job.status.attempt}"
        )
        self._require(job.status.phase not in FINISHED, name, f"{pod.name} was created after the end of the job")
        if job.spec.queue_name is not None:
            self._check_admission(name, pod.name)
        active = [
            other.observed
            for other in self.cluster.server.pods.values()
            if other.job == name and other.observed.export is None and self._is_active(other)
        ]
        asked = job.spec.topology.nodes or job.spec.topology.max_nodes or 1
        # Each pod that fell back from spot may have a standby pod that waits for a spot node to replace it.
        allowed = asked + sum(other.fell_back for other in active)
        names = [other.name for other in active]
        self._require(len(active) <= allowed, name, f"{len(active)} pods instead of {allowed}: {names}")
        members = set(members_of(job.status, job.spec))
        self._require(len(members) == (job.status.attempts[-1].nodes or asked), name, f"members {members}")
        gang = [other for other in active if (other.attempt, other.node_rank) in members]
        self._require(len(gang) <= asked, name, f"{len(gang)} pods in the gang instead of {asked}: {names}")
        least = job.spec.topology.min_nodes or asked
        self._require(least <= len(members) <= asked, name, f"{len(members)} nodes, not {least} to {asked}")

    def pod_deleted(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """The operator deletes no pod of an open attempt."""
        entry = job.status.attempts[-1] if job.status.attempts else None
        gang = members_of(job.status, job.spec)
        is_active = entry is not None and entry.ended_at is None and (pod.attempt, pod.node_rank) in gang
        self._require(
            not is_active or pod.deleted_at is not None or job.status.phase in FINISHED,
            job.metadata.name,
            f"{pod.name} was deleted while its attempt was open",
        )

    def pod_resized(self, job: FineTuneJob, pod: ObservedPod, memory: str) -> None:
        """A pod of a running job gets more memory, never more than its job allows. A lost response causes a repeat."""
        self.counts["pods resized"] += 1
        name, most = job.metadata.name, job.spec.recovery.max_memory
        self._require(job.status.phase not in FINISHED, name, f"{pod.name} was resized after the end of the job")
        grows = pod.memory is not None and parse_quantity(memory) >= parse_quantity(pod.memory)
        self._require(grows, name, f"the memory of {pod.name} changed from {pod.memory} to {memory}")
        allowed = most is not None and parse_quantity(memory) <= parse_quantity(most)
        self._require(allowed, name, f"{pod.name} has {memory}, allowed are {most}")

    def quota_released(self, job_name: str) -> None:
        """The operator releases the quota of a job only when no pod uses it."""
        self.counts["quota released"] += 1
        own = [pod.observed for pod in self.cluster.server.pods.values() if pod.job == job_name]
        own = [pod for pod in own if pod.export is None]
        pods = [pod.name for pod in own if pod.phase not in ENDED]
        self._require(not pods, job_name, f"its quota was released although {pods} exist")

    def committed(self, job_name: str, attempt: int, step: int) -> None:
        """Only the newest attempt commits, and the committed steps increase."""
        self.counts["checkpoints"] += 1
        before = self._committed.get(job_name, (0, 0))
        self._require(
            attempt >= before[0], job_name, f"attempt {attempt} committed after attempt {before[0]} had committed"
        )
        self._require(step > before[1], job_name, f"step {step} was committed after step {before[1]}")
        self._committed[job_name] = (attempt, step)
        job = self.cluster.server.jobs.get(job_name)
        self._require(
            job is None or attempt <= job.status.attempt,
            job_name,
            f"attempt {attempt} is newer than the one in the status",
        )

    # -- called by the episode ----------------------------------------------------------------------------------------

    def all_ended(self, num_writes_before: int) -> None:
        """After the quiet time every job has ended, no old PodGroup is left, and the operator writes nothing."""
        for name, job in self.cluster.server.jobs.items():
            status = job.status
            self._require(status.phase in FINISHED, name, f"it has not ended: {status.phase} {status.message}")
            used = {pod.group for pod in self.cluster.server.pods.values()} | {f"{name}-a{status.attempt}"}
            groups = {
                child for kind, job_name, child in self.cluster.server.children if (kind, job_name) == (POD_GROUP, name)
            }
            self._require(groups <= used, name, f"PodGroups {groups - used} are left")
            if status.phase is Phase.SUCCEEDED:
                storage = self.cluster.server.storage[name]
                self._require(storage.step == storage.workload.total_steps, name, "it succeeded before its last step")
                written = [output for output in status.outputs if output.state is OutputState.WRITTEN]
                exported = len(written) == len(job.spec.outputs)
                self._require(exported, name, "it succeeded before its outputs were complete")
        num_writes = self.cluster.server.num_writes - num_writes_before
        self._require(num_writes == 0, "all", f"{num_writes} writes while the cluster was idle")

    # -- details ------------------------------------------------------------------------------------------------------

    def _check_export(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """An export pod is created after the last step, and is the only one."""
        self.counts["export pods"] += 1
        name, storage = job.metadata.name, self.cluster.server.storage[job.metadata.name]
        self._require(job.status.phase not in FINISHED, name, f"{pod.name} was created after the end of the job")
        has_trained = storage.step == storage.workload.total_steps
        self._require(has_trained, name, f"{pod.name} was created before the last step")
        pods = self.cluster.server.pods.values()
        exports = [each for each in pods if each.job == name and each.observed.export is not None]
        self._require(len(exports) == 1, name, f"{len(exports)} export pods exist")

    def _check_admission(self, job: str, pod: str) -> None:
        """No pod exists before its job has quota; the operator may not have noticed yet that its Workload is gone."""
        queue = self.cluster.server.queue
        gone_seconds = self.cluster.engine.time - queue.deleted_at.get(job, -DELETION_SECONDS)
        self._require(queue.has_quota(job) or gone_seconds < DELETION_SECONDS, job, f"{pod} exists without quota")

    def _is_active(self, pod: SimulatedPod) -> bool:
        """Return whether a pod is active: it has not ended, is not being deleted, and its node is connected."""
        reachable = pod.node is None or pod.node.connected
        return pod.observed.phase not in ENDED and pod.observed.deleted_at is None and reachable

    def _check_checkpoint(self, old: FineTuneJobStatus, new: FineTuneJobStatus, name: str) -> None:
        if new.last_checkpoint is None:
            self._require(old.last_checkpoint is None, name, "the last checkpoint was removed from the status")
            return
        before = old.last_checkpoint.step if old.last_checkpoint else 0
        storage = self.cluster.server.storage[name]
        self._require(new.last_checkpoint.step >= before, name, "the step of the last checkpoint decreased")
        self._require(
            new.last_checkpoint.step <= storage.step, name, "the last checkpoint does not exist on the storage"
        )

    def _check_end(self, old: FineTuneJobStatus, new: FineTuneJobStatus, name: str) -> None:
        """Count the end of the newest attempt. The release of an incomplete gang costs no budget and no step."""
        entry = new.attempts[-1] if new.attempts else None
        before = old.attempts[-1] if old.attempts and old.attempt == new.attempt else None
        if entry is None or entry.reason is None or (before is not None and before.reason is not None):
            return
        self.counts[f"ended {entry.reason}"] += 1
        if entry.reason == Reason.GANG_RELEASED:
            costs = (new.failures + new.preemptions) - (old.failures + old.preemptions)
            self._require(costs == 0, name, "the release of an incomplete gang was counted")
            self._require(new.lost_steps == old.lost_steps, name, "the release of an incomplete gang lost steps")

    def _check_budget(self, job: FineTuneJob, new: FineTuneJobStatus) -> None:
        name, allowed = job.metadata.name, job.spec.recovery.max_failures
        caused = self.cluster.failures_injected[name]
        self._require(
            new.failures <= caused, name, f"{new.failures} failures were counted, {caused} injected: {_ends(new)}"
        )
        spent = new.tally.failures_since_checkpoint
        if new.phase is Phase.FAILED and new.reason == Reason.MAX_FAILURES_EXCEEDED:
            self._require(spent == allowed + 1, name, f"it failed after {spent} failures, {allowed} are allowed")
        elif new.attempts and new.phase is not Phase.FAILED and new.attempts[-1].reason != Reason.FABRIC_ERROR:
            # After a lost peer the job waits for the state of its node before it fails or begins another attempt.
            self._require(spent <= allowed, name, f"it continues after {spent} failures, {allowed} are allowed")

    def _require(self, holds: bool, job: str, message: str) -> None:
        if not holds:
            raise BrokenInvariantError(f"job {job}: {message}")


def _ends(status: FineTuneJobStatus) -> str:
    return ", ".join(f"{entry.attempt}: {entry.reason}" for entry in status.attempts)
