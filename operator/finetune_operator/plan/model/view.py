"""One reconcile's view of a job: the observed state, sorted by attempt and node rank. Policies read it only.

"The attempt" is always the one that the status contained when the reconcile began. A reconcile that raises
`status.attempt` still reads the pods of the old attempt, and creates nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from finetune_contract.heartbeat import RankReport, RankState
from finetune_contract.phase import FINISHED
from finetune_operator.api.job import FineTuneJob, FineTuneJobSpec
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.manifests.run_spec import num_nodes
from finetune_operator.manifests.template import hash_template
from finetune_operator.plan.model.types import Observed, ObservedPod, PodPhase, ReceivedHeartbeat
from finetune_operator.settings import Settings

UP = frozenset({PodPhase.RUNNING, PodPhase.SUCCEEDED})
ENDED = frozenset({PodPhase.SUCCEEDED, PodPhase.FAILED})
FIRST_SIGNAL_EXIT = 129
"""Exit codes from this one on mean that a signal ended the container."""


class Member(NamedTuple):
    """Identifies a pod of the job: the attempt for which it was created, and the number in its name."""

    attempt: int
    number: int


@dataclass(frozen=True)
class View:
    """The input of all policies in one reconcile."""

    job: FineTuneJob
    observed: Observed
    """The observed state as `nodes.apply_node_state` corrected it."""
    now: datetime
    settings: Settings
    unadjusted: Observed | None = None
    """The observed state before that; None: the same. Only `nodes` reads it, as `raw`."""

    @property
    def raw(self) -> Observed:
        """The observed state without corrections."""
        return self.unadjusted if self.unadjusted is not None else self.observed

    @property
    def spec(self) -> FineTuneJobSpec:
        """The job's spec."""
        return self.job.spec

    @property
    def attempt(self) -> int:
        """The attempt that the status contained when this reconcile began; 0: none yet."""
        return self.job.status.attempt

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """The pod of each node rank of the attempt."""
        return members_of(self.job.status, self.spec)

    @property
    def num_nodes(self) -> int:
        """Number of pods in the attempt's gang."""
        return len(self.members)

    def is_kept(self, node_rank: int) -> bool:
        """Return whether a node rank's pod is kept from an earlier attempt: such a pod is never created."""
        return self.members[node_rank].attempt != self.attempt

    @cached_property
    def pods(self) -> dict[int, ObservedPod]:
        """The pods of the attempt, by node rank in its world."""
        observed = {Member(pod.attempt, pod.node_rank): pod for pod in self.observed.pods}
        return {rank: observed[member] for rank, member in enumerate(self.members) if member in observed}

    @cached_property
    def standbys(self) -> dict[int, ObservedPod]:
        """Standby pods: pods of the attempt without a rank, by the number in their name."""
        members = set(self.members)
        extra = (pod for pod in self.observed.pods if pod.attempt == self.attempt)
        return {pod.node_rank: pod for pod in extra if Member(pod.attempt, pod.node_rank) not in members}

    @cached_property
    def older_pods(self) -> tuple[ObservedPod, ...]:
        """Pods of earlier attempts that are not kept."""
        members = set(self.members)
        older = (pod for pod in self.observed.pods if pod.attempt < self.attempt)
        return tuple(pod for pod in older if Member(pod.attempt, pod.node_rank) not in members)

    @cached_property
    def newest_attempt(self) -> int:
        """The newest attempt to which an observed pod belongs; 0: there are no pods."""
        return max((pod.attempt for pod in self.observed.pods), default=0)

    @cached_property
    def beats(self) -> dict[int, ReceivedHeartbeat]:
        """The newest heartbeats of the attempt, by node rank. If the rank's pod is observed, only that pod's count."""
        found = {}
        for received in self.observed.beats.values():
            beat = received.beat
            pod = self.pods.get(beat.node_rank)
            if beat.node_rank >= self.num_nodes:
                continue
            if beat.attempt == self.attempt and (pod is None or pod.uid == beat.pod_uid):
                found[beat.node_rank] = received
        return dict(sorted(found.items()))

    @property
    def creation_on_hold(self) -> bool:
        """Return whether creating an object is useless for now: the API server would refuse it again."""
        refusal = self.observed.refusal
        return refusal is not None and refusal.hold_until is not None and self.now < refusal.hold_until

    @cached_property
    def template(self) -> str:
        """The hash of the fields of the current spec that only new pods read."""
        return hash_template(self.spec)

    def is_outdated(self, pod: ObservedPod) -> bool:
        """Return whether the spec was edited since a pod was created, in fields that only new pods read."""
        return pod.template is not None and pod.template != self.template

    @property
    def has_outdated_pods(self) -> bool:
        """Return whether a pod of the attempt was created from an earlier spec."""
        return any(self.is_outdated(pod) for pod in self.pods.values())

    def heartbeat_of(self, pod: ObservedPod) -> ReceivedHeartbeat | None:
        """Return the newest heartbeat of a pod, of any attempt: a kept pod may not have joined this attempt yet."""
        return self.observed.beats.get(pod.uid)

    @cached_property
    def reports(self) -> tuple[RankReport, ...]:
        """The reports of the attempt's ranks, by rank."""
        reports = (report for received in self.beats.values() for report in received.beat.ranks)
        return tuple(sorted(reports, key=lambda report: report.rank))

    def is_done(self, node_rank: int) -> bool:
        """Return whether all ranks of a node are done, according to its trainer's container or its last heartbeat.

        Neither the end of a sidecar nor a signal that ends a supervisor after its last heartbeat undoes their work.
        """
        pod = self.pods.get(node_rank)
        if pod is not None and has_ended(pod):
            succeeded = pod.exit_code is None and pod.phase is PodPhase.SUCCEEDED
            if succeeded or (pod.exit_code is not None and pod.exit_code < FIRST_SIGNAL_EXIT):
                return not pod.exit_code
        received = self.beats.get(node_rank)
        if received is None or len(received.beat.ranks) < self.spec.topology.processes_per_node:
            return False
        return all(report.state is RankState.DONE for report in received.beat.ranks)

    def all_up(self) -> bool:
        """Return whether every pod of the gang is observed and runs or is done."""
        if len(self.pods) != self.num_nodes:
            return False
        return all(pod.phase in UP or self.is_done(rank) for rank, pod in self.pods.items())

    def all_ended(self) -> bool:
        """Return whether every pod of the gang is observed and has ended: no pod can show a better cause later."""
        return len(self.pods) >= self.num_nodes and all(has_ended(pod) for pod in self.pods.values())


def has_ended(pod: ObservedPod) -> bool:
    """Return whether the trainer's container has ended; a sidecar may keep the pod itself running."""
    return pod.phase in ENDED or pod.exit_code is not None


def members_of(status: FineTuneJobStatus, spec: FineTuneJobSpec) -> tuple[Member, ...]:
    """Return the pod of each node rank of the newest attempt."""
    entry = status.attempts[-1] if status.attempts else None
    size = (entry.nodes if entry is not None else None) or num_nodes(spec)
    attempts = entry.pod_attempts if entry is not None else ()
    ranks = (entry.pod_ranks if entry is not None else None) or ()
    attempts = attempts if len(attempts) == size else (status.attempt,) * size
    ranks = ranks if len(ranks) == size else tuple(range(size))
    return tuple(map(Member, attempts, ranks))


def oldest_attempt(status: FineTuneJobStatus) -> int:
    """Return the oldest attempt whose heartbeats still matter: kept pods may not have joined the newest one yet."""
    kept = status.attempts[-1].pod_attempts if status.attempts else ()
    return min((status.attempt, *kept)) - 1


def nodes_of(status: FineTuneJobStatus, pods: Iterable[ObservedPod]) -> frozenset[str]:
    """Return the nodes that matter to a job: those of its pods, and those that the ledger records for deleted pods."""
    recorded = (entry.pod_nodes or () for entry in status.attempts[-2:])
    return frozenset(chain(*recorded, (pod.node for pod in pods if pod.node is not None)))


def is_finished(status: FineTuneJobStatus) -> bool:
    """Return whether the job has finished."""
    return status.phase in FINISHED


def earliest(times: Iterable[datetime | None]) -> datetime | None:
    """Return the earliest of the given times; None if there is none."""
    return min((time for time in times if time is not None), default=None)
