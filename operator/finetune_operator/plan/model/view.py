"""One pass's view of a job: what was observed, sorted by attempt and node rank. All policies read it; none changes it.

"The attempt" is always the one that the status held when the pass began. A pass that raises `status.attempt` still
looks at the pods of the old one, and creates nothing.
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
from finetune_operator.api.job import FineTuneJob, FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.manifests.run_spec import num_nodes
from finetune_operator.plan.model.types import Observed, ObservedPod, PodPhase, ReceivedHeartbeat
from finetune_operator.settings import Settings

UP = frozenset({PodPhase.RUNNING, PodPhase.SUCCEEDED})
ENDED = frozenset({PodPhase.SUCCEEDED, PodPhase.FAILED})


class Member(NamedTuple):
    """Names a pod of the job: the attempt that it was made for, and the number in its name."""

    attempt: int
    number: int


@dataclass(frozen=True)
class View:
    """What a pass decides from."""

    job: FineTuneJob
    observed: Observed
    now: datetime
    settings: Settings

    @property
    def spec(self) -> FineTuneJobSpec:
        """What the user asks for."""
        return self.job.spec

    @property
    def attempt(self) -> int:
        """The attempt that the status held when this pass began; 0: none yet."""
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
        """Whether a node rank's pod was taken over from an earlier attempt: it is never created."""
        return self.members[node_rank].attempt != self.attempt

    @cached_property
    def pods(self) -> dict[int, ObservedPod]:
        """The pods of the attempt, by node rank in its world."""
        seen = {Member(pod.attempt, pod.node_rank): pod for pod in self.observed.pods}
        return {rank: seen[member] for rank, member in enumerate(self.members) if member in seen}

    @cached_property
    def standbys(self) -> dict[int, ObservedPod]:
        """Pods of the attempt that belong to no rank of it and wait for the next world, by the number in their name."""
        mine = set(self.members)
        extra = (pod for pod in self.observed.pods if pod.attempt == self.attempt)
        return {pod.node_rank: pod for pod in extra if Member(pod.attempt, pod.node_rank) not in mine}

    @cached_property
    def older_pods(self) -> tuple[ObservedPod, ...]:
        """Pods of attempts that are over, those that were kept aside."""
        mine = set(self.members)
        older = (pod for pod in self.observed.pods if pod.attempt < self.attempt)
        return tuple(pod for pod in older if Member(pod.attempt, pod.node_rank) not in mine)

    @cached_property
    def newest_attempt(self) -> int:
        """The newest attempt that anything is known of."""
        return max((pod.attempt for pod in self.observed.pods), default=0)

    @cached_property
    def beats(self) -> dict[int, ReceivedHeartbeat]:
        """The newest beats of the attempt, by node rank. Where its pod is seen, a beat is that very pod's."""
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
    def holds_back(self) -> bool:
        """Whether there is no use in creating anything yet: the cluster would refuse it again."""
        refusal = self.observed.refusal
        return refusal is not None and refusal.hold_until is not None and self.now < refusal.hold_until

    def heard(self, pod: ObservedPod) -> ReceivedHeartbeat | None:
        """The newest beat of a pod, whatever attempt it speaks of: one that is kept may not have come to this one."""
        return self.observed.beats.get(pod.uid)

    @cached_property
    def reports(self) -> tuple[RankReport, ...]:
        """What the ranks of the attempt say, by rank."""
        reports = (report for received in self.beats.values() for report in received.beat.ranks)
        return tuple(sorted(reports, key=lambda report: report.rank))

    def is_done(self, node_rank: int) -> bool:
        """Whether all ranks of a node have done all that was asked: its pod says so, or its last beat did."""
        pod = self.pods.get(node_rank)
        if pod is not None and has_ended(pod):
            return pod.phase is not PodPhase.FAILED and not pod.exit_code
        received = self.beats.get(node_rank)
        if received is None or len(received.beat.ranks) < self.spec.topology.processes_per_node:
            return False
        return all(report.state is RankState.DONE for report in received.beat.ranks)

    def all_up(self) -> bool:
        """Whether every pod of the gang is seen to run, or to have done its work."""
        return len(self.pods) == self.num_nodes and all(pod.phase in UP for pod in self.pods.values())

    def all_ended(self) -> bool:
        """Whether every pod of the gang has been seen to end: nobody is left who could show a better cause."""
        return len(self.pods) >= self.num_nodes and all(has_ended(pod) for pod in self.pods.values())


def has_ended(pod: ObservedPod) -> bool:
    """Whether the trainer's container has ended; a sidecar may keep the pod itself running."""
    return pod.phase in ENDED or pod.exit_code is not None


def members_of(status: FineTuneJobStatus, spec: FineTuneJobSpec) -> tuple[Member, ...]:
    """The pod of each node rank of the newest attempt."""
    entry = status.attempts[-1] if status.attempts else None
    size = (entry.nodes if entry is not None else None) or num_nodes(spec)
    attempts = entry.pod_attempts if entry is not None else ()
    ranks = (entry.pod_ranks if entry is not None else None) or ()
    attempts = attempts if len(attempts) == size else (status.attempt,) * size
    ranks = ranks if len(ranks) == size else tuple(range(size))
    return tuple(map(Member, attempts, ranks))


def oldest_attempt(status: FineTuneJobStatus) -> int:
    """The oldest attempt whose beats still matter: pods that are kept may not have come to the newest one yet."""
    kept = status.attempts[-1].pod_attempts if status.attempts else ()
    return min((status.attempt, *kept)) - 1


def nodes_of(status: FineTuneJobStatus, pods: Iterable[ObservedPod]) -> frozenset[str]:
    """The nodes that matter to a job: of its pods, and of those that the ledger remembers although they may be gone."""
    noted = (entry.pod_nodes or () for entry in status.attempts[-2:])
    return frozenset(chain(*noted, (pod.node for pod in pods if pod.node is not None)))


def is_finished(status: FineTuneJobStatus) -> bool:
    """Whether the job has come to its end."""
    return status.phase in FINISHED


def earliest(times: Iterable[datetime | None]) -> datetime | None:
    """The first of some moments; None where there is none."""
    return min((time for time in times if time is not None), default=None)
