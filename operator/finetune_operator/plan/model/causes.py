"""Determines why an attempt ended: a table from the observed state of a pod to a cause, and the choice among pods.

Called by `endings`. In a gang, one end is followed by others within a second. The order of the table is the order of
precedence. A row marked as a consequence counts only if no better cause is observed in time (see `endings`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_contract.exit_codes import ExitCode, describe
from finetune_contract.heartbeat import GpuFault
from finetune_contract.timeouts import COLLECTIVE_TIMEOUT
from finetune_operator.api.job import Accelerator
from finetune_operator.api.names import pod_name
from finetune_operator.api.reasons import REASONS, CountsAs, Reason
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.types import HEALTHY, ObservedNode, ObservedPod, PodPhase
from finetune_operator.plan.model.view import View, has_ended

SIGTERM_EXIT = 143
OUT_OF_MEMORY_TEXTS = ("out of memory", "memoryerror", "cannot allocate memory", "can't allocate memory")
"""Parts of the messages of CUDA, Python, the C library and torch's allocator when memory runs out, in lower case."""
FABRIC_TEXTS = (
    *("distbackenderror", "distnetworkerror", "ncclsystemerror", "ncclremoteerror", "unhandled nccl error"),
    *("nccl error", "nccl communicator was aborted", "watchdog caught collective operation timeout"),
    *("gloo/transport", "connection closed by peer", "connection reset by peer", "oneccl:", "ccl_error"),
)
"""Parts of the messages of torch, NCCL, gloo and oneCCL about a lost peer or network, in lower case. What a pod prints
at its start contains none of them: that is the last output of a supervisor that is killed."""
RUNTIME_LOST = frozenset({"ContainerStatusUnknown", "Unknown"})
"""Reasons of the end of a container that the kubelet or the runtime did not see: its node was restarted."""
REJECTED = "Pod was rejected"
"""Start of the kubelet's message about a pod that it did not admit."""
REJECTIONS = ("OutOf", "UnexpectedAdmissionError", "NodeAffinity", "TopologyAffinityError", "SMTAlignmentError")
"""Prefixes of status.reason of pods that a kubelet did not admit, or did not admit again after its own restart."""
OF_STARTED_PODS = frozenset({"Evicted", "DeadlineExceeded"})
"""status.reason of pods that a kubelet ended because of what the pod itself did."""
KUBELET_SHUTDOWN = frozenset({"Preempting", "Shutdown", "NodeShutdown", "Terminated", "TerminatedByKubelet"})
"""status.reason of pods that a kubelet ended because of the node."""


@dataclass(frozen=True)
class Facts:
    """The observed facts about one node rank of the gang."""

    node_rank: int
    rank: int
    """The global rank that ended first on this node; the node's first rank if none has ended."""
    pod: ObservedPod | None
    """None: missing from a gang that was complete."""
    code: int | None = None
    """Exit code of the pod, or of its first rank that ended."""
    notice: bool = False
    """Whether its supervisor has received SIGTERM."""
    last_output: str = ""
    """The last lines that its first ended rank printed."""
    waited_for_pods: bool = False
    """Whether the pods of the attempt never ran at the same time, or started too late for the ranks that waited."""
    never_joined: bool = False
    """Whether it was kept for the attempt, and ended before it joined."""
    node: ObservedNode = HEALTHY
    """State of its node."""
    gpu_fault: GpuFault | None = None
    """The first fault of its GPUs: reported by its driver, or else by a health tool. CPU jobs have none."""


@dataclass(frozen=True)
class CauseRow:
    """One row of the table: when it applies, and the resulting reason."""

    applies: Callable[[Facts], bool]
    reason: Callable[[Facts], Reason]
    consequence: bool = False
    """Whether something else, on this pod or another one, must have happened first."""


@dataclass(frozen=True)
class Cause:
    """Cause of the end of an attempt, as the ledger records it."""

    reason: Reason
    rank: int
    pod: str
    node: str | None = None
    exit_code: int | None = None
    message: str = ""
    """The last output of the rank, or else what the cluster reports."""
    consequence: bool = False
    gpu_fault: GpuFault | None = None

    @property
    def counts_as(self) -> CountsAs | None:
        """Return how the end counts: as preemption, as failure, or as neither (None)."""
        return REASONS[self.reason].counts_as


def _always(reason: Reason) -> Callable[[Facts], Reason]:
    return lambda _: reason


def _code(*codes: int) -> Callable[[Facts], bool]:
    return lambda facts: facts.code in codes


def _pod(test: Callable[[ObservedPod], bool]) -> Callable[[Facts], bool]:
    return lambda facts: facts.pod is not None and test(facts.pod)


def _disruption(facts: Facts) -> Reason:
    """Return Kubernetes' reason of the disruption if it is one that we document, otherwise Preempted."""
    disruption = facts.pod.disruption if facts.pod is not None else None
    return Reason(disruption) if disruption in DISRUPTIONS else Reason.PREEMPTED


def _output_contains(facts: Facts, texts: tuple[str, ...]) -> bool:
    """Return whether the rank's last output contains one of the texts."""
    output = facts.last_output.lower()
    return any(text in output for text in texts)


def is_refused(pod: ObservedPod) -> bool:
    """Return whether the kubelet of its node did not admit a pod: a state of the node, in which no rank has started.

    The list of the kubelet's reasons is open, so any other reason of a pod that never started counts as well.
    """
    if pod.phase is not PodPhase.FAILED or pod.init_failure is not None:
        return False
    reason = pod.reason or ""
    if (pod.message or "").startswith(REJECTED) or reason.startswith(REJECTIONS):
        return True
    never_started = pod.exit_code is None and pod.termination is None
    return never_started and reason not in {"", *OF_STARTED_PODS, *KUBELET_SHUTDOWN, "NodeLost", "OOMKilled"}


def shows_gpu_fault(facts: Facts) -> bool:
    """Return whether a fault of a GPU ends the attempt, or has ended it.

    A fault alone is no end: ranks may work on, for example if it is on a GPU of another pod.
    """
    pod, has_failed = facts.pod, facts.code not in {None, ExitCode.DONE}
    if facts.code == ExitCode.DEVICE or (pod is not None and pod.disruption == BY_DEVICE_TAINT):
        return True
    if facts.gpu_fault is None:
        return False
    if facts.gpu_fault.uuid:
        return has_failed or pod is None
    # A health tool reports the node, not the GPU: an end with an explanation of its own keeps that.
    is_unexplained = has_failed and facts.code not in EXPLAINED
    return is_unexplained or (pod is not None and pod.disruption == facts.node.leaving != "")


BY_DEVICE_TAINT = "DeletionByDeviceTaintManager"
"""Reason of the DisruptionTarget condition of a pod with a tainted device (DRA)."""
EXPLAINED = frozenset(set(ExitCode) - {ExitCode.SOFTWARE, ExitCode.DEVICE})
"""Exit codes whose meaning explains an end."""


def is_capacity_end(pod: ObservedPod) -> bool:
    """Return whether the cluster, not the program, ended a pod."""
    ended = has_ended(pod)
    return ended and (pod.disruption is not None or pod.reason in KUBELET_SHUTDOWN or is_refused(pod))


DISRUPTIONS = frozenset(
    {
        Reason.PREEMPTION_BY_SCHEDULER,
        Reason.EVICTION_BY_EVICTION_API,
        Reason.DELETION_BY_TAINT_MANAGER,
        Reason.DELETION_BY_POD_GC,
        Reason.TERMINATION_BY_KUBELET,
    }
)

BY_THE_CLUSTER = DISRUPTIONS | {Reason.PREEMPTED, Reason.NODE_LOST}
"""Reasons of disruptions by the cluster itself; no action of the operator causes them."""

TABLE: tuple[CauseRow, ...] = (
    # Errors that would end every further attempt in the same way come first.
    CauseRow(_code(ExitCode.CONFIG), _always(Reason.CONFIGURATION_ERROR)),
    CauseRow(_code(ExitCode.DATA), _always(Reason.DATA_ERROR)),
    # What a rank reports after an error of its GPU follows from it, and the deletion by a health tool does, too.
    CauseRow(shows_gpu_fault, _always(Reason.GPU_FAULT)),
    # Preemptions that the cluster reports. They precede exit codes: a save after a notice may fail in many ways.
    CauseRow(_pod(lambda pod: pod.disruption is not None), _disruption),
    CauseRow(_pod(is_refused), _always(Reason.REFUSED_BY_KUBELET)),
    CauseRow(_pod(lambda pod: pod.reason in KUBELET_SHUTDOWN), _always(Reason.TERMINATION_BY_KUBELET)),
    CauseRow(_pod(lambda pod: pod.reason == "NodeLost"), _always(Reason.NODE_LOST)),
    CauseRow(_pod(lambda pod: pod.reason in RUNTIME_LOST), _always(Reason.NODE_LOST)),
    # Deleted before its termination message was read: the facts known earlier give the reason.
    CauseRow(lambda facts: facts.pod is None and facts.notice, _always(Reason.PREEMPTED)),
    CauseRow(lambda facts: facts.pod is None and facts.node.leaving != "", _always(Reason.PREEMPTED)),
    CauseRow(lambda facts: facts.pod is None and (facts.node.lost or facts.node.gone), _always(Reason.NODE_LOST)),
    CauseRow(lambda facts: facts.pod is None, _always(Reason.POD_LOST)),
    CauseRow(lambda facts: facts.never_joined, _always(Reason.POD_LOST)),
    # The operator deletes only pods of attempts that have ended: another client deleted this one.
    CauseRow(_pod(lambda pod: pod.deleted_at is not None), _always(Reason.POD_DELETED)),
    # The rank knows what did not work; the errors of its peers follow from its exit.
    CauseRow(_code(ExitCode.NETWORK), _always(Reason.NETWORK_ERROR)),
    CauseRow(_code(ExitCode.STORAGE_OUTAGE), _always(Reason.STORAGE_UNAVAILABLE)),
    # Failures of the program. A kubelet under node pressure sets DisruptionTarget (above); an eviction without it is
    # due to the pod's own usage.
    CauseRow(_pod(lambda pod: pod.reason == "Evicted"), _always(Reason.EVICTED)),
    CauseRow(_pod(lambda pod: pod.init_failure is not None), _always(Reason.INIT_CONTAINER_FAILED)),
    CauseRow(_pod(lambda pod: pod.reason == "OOMKilled"), _always(Reason.OUT_OF_MEMORY)),
    # Only the kernel sends SIGKILL to a container that is not being deleted, except after a notice.
    CauseRow(
        lambda facts: facts.pod is not None and facts.pod.killed and not facts.notice, _always(Reason.OUT_OF_MEMORY)
    ),
    CauseRow(lambda facts: _output_contains(facts, OUT_OF_MEMORY_TEXTS), _always(Reason.OUT_OF_MEMORY)),
    CauseRow(_code(ExitCode.STORAGE), _always(Reason.STORAGE_ERROR)),
    CauseRow(_code(ExitCode.STALE), _always(Reason.CHECKPOINT_STALE)),
    CauseRow(_code(ExitCode.SUPERSEDED), _always(Reason.SUPERSEDED)),
    # Received SIGTERM, and the origin is not visible yet: perhaps another pod of the gang has the notice.
    CauseRow(_code(ExitCode.SAVED), _always(Reason.NOTICE_SAVED), consequence=True),
    CauseRow(_code(SIGTERM_EXIT), _always(Reason.PREEMPTED), consequence=True),
    CauseRow(lambda facts: facts.notice, _always(Reason.PREEMPTED), consequence=True),
    # The rendezvous timed out while a pod had no node or image yet: no peer was lost.
    CauseRow(
        lambda facts: facts.code == ExitCode.FABRIC and facts.waited_for_pods,
        _always(Reason.PODS_LATE),
        consequence=True,
    ),
    # A collective lost a peer: that peer's own end is the cause.
    CauseRow(_code(ExitCode.FABRIC), _always(Reason.FABRIC_ERROR), consequence=True),
    CauseRow(
        lambda facts: facts.code not in (None, ExitCode.DONE) and _output_contains(facts, FABRIC_TEXTS),
        _always(Reason.FABRIC_ERROR),
        consequence=True,
    ),
    CauseRow(lambda facts: facts.code not in (None, ExitCode.DONE), _always(Reason.PROCESS_FAILED)),
    CauseRow(_pod(lambda pod: pod.phase is PodPhase.FAILED), _always(Reason.PROCESS_FAILED)),
)
"""The first row that applies to a pod is its sign. Among the pods, the sign of the earliest row is the cause."""


def find_cause(view: View, gang_complete: bool) -> Cause | None:
    """Return the cause that ended the attempt, or is about to end it; None if all pods are healthy.

    Among pods of the same row, the one that ended first is the cause, then the one with the lowest rank.
    """
    signs = []
    for facts in _gang(view, gang_complete):
        if is_late(view, facts):
            continue
        for index, row in enumerate(TABLE):
            if row.applies(facts):
                signs.append((_weight(row, index), _ended_at(facts, view), facts.node_rank, row, facts))
                break
    if not signs:
        return None
    *_, row, facts = min(signs, key=lambda sign: sign[:3])
    return _cause(row, facts, view)


def find_silent(view: View, since: datetime) -> Cause | None:
    """Return the loss of a running pod that has sent no heartbeat since its peers lost it: its node does not respond.

    None if no pod has sent a heartbeat since: then the coordinator was unreachable.
    """
    reporting = {rank for rank, received in view.beats.items() if received.received_at >= since}
    gang = _gang(view, gang_complete=True)
    silent = [facts for facts in gang if facts.node_rank not in reporting and _should_send(facts.pod)]
    # The end of a pod counts as a sign of life, too: its node reported it.
    alive = reporting or any(facts.pod is not None and has_ended(facts.pod) for facts in gang)
    if not alive or not silent:
        return None
    return _cause(CauseRow(lambda _: True, _always(Reason.NODE_LOST)), silent[0], view)


def _should_send(pod: ObservedPod | None) -> bool:
    return pod is not None and pod.phase is PodPhase.RUNNING and not has_ended(pod)


def _weight(row: CauseRow, index: int) -> tuple[bool, int]:
    return row.consequence, index


def _ended_at(facts: Facts, view: View) -> float:
    ended_at = facts.pod.finished_at if facts.pod is not None else None
    return (ended_at or view.now).timestamp()


def _gang(view: View, gang_complete: bool) -> list[Facts]:
    """Return the facts of every node rank whose pod exists, or should exist, and is not done."""
    gang = []
    for node_rank in range(view.num_nodes):
        pod = view.pods.get(node_rank)
        expected = gang_complete or view.is_kept(node_rank)
        if (pod is not None or expected) and not view.is_done(node_rank):
            gang.append(_facts(view, node_rank, pod))
    return gang


def _facts(view: View, node_rank: int, pod: ObservedPod | None) -> Facts:
    received = view.beats.get(node_rank)
    beat = received.beat if received is not None else None
    termination = pod.termination if pod is not None and has_ended(pod) else None
    ends = (termination.ends if termination else ()) or (beat.ends if beat else ())
    first = ends[0] if ends else None
    code = pod.exit_code if pod is not None else None
    if code is None and termination is not None:
        code = termination.exit_code
    if code is None and first is not None:
        code = first.exit_code
    reported = (termination.gpu_faults if termination else ()) or (beat.gpu_faults if beat else ())
    node = view.observed.nodes.get(_node_of(view, node_rank, pod) or "", HEALTHY)
    return Facts(
        node_rank=node_rank,
        rank=first.rank if first else node_rank * view.spec.topology.processes_per_node,
        pod=pod,
        code=code,
        notice=bool((beat and beat.notice) or (termination and termination.notice)),
        last_output=first.last_words if first else "",
        waited_for_pods=_waited_for_pods(view),
        never_joined=termination is not None and termination.attempt < view.attempt,
        node=node,
        gpu_fault=next(iter(reported), None) or _reported_fault(view, node),
    )


def _reported_fault(view: View, node: ObservedNode) -> GpuFault | None:
    """Return the fault of a GPU that a health tool reports of a node; None for CPU jobs."""
    if not node.gpu_fault or view.spec.topology.accelerator is not Accelerator.GPU:
        return None
    return GpuFault(uuid="", message=node.gpu_fault)


def _waited_for_pods(view: View) -> bool:
    """Return whether a rendezvous that timed out is due to the wait for pods.

    Ranks time out `COLLECTIVE_TIMEOUT` after the start of their own pod. If they spent more of that time waiting for
    other pods than for those pods' ranks, a peer was still coming.
    """
    entry = current(view.job.status)
    if entry is None or entry.attempt != view.attempt:
        return False
    seconds = entry.seconds
    if seconds.pulling is None:
        return True
    if seconds.restoring is not None or entry.training_at is not None:
        return False
    waited = timedelta(seconds=(seconds.queueing or 0.0) + seconds.pulling)
    elapsed = (entry.ended_at or view.now) - entry.started_at
    return elapsed >= COLLECTIVE_TIMEOUT and 2 * waited > elapsed


def is_late(view: View, facts: Facts) -> bool:
    """Return whether a rank timed out in a running pod while other pods are still pending: the attempt stays open.

    Once they run, the attempt ends, and the next one begins with all pods.
    """
    pod = facts.pod
    if pod is None or has_ended(pod) or facts.code != ExitCode.FABRIC or not facts.waited_for_pods:
        return False
    return any(other.phase is PodPhase.PENDING for other in view.pods.values())


def _cause(row: CauseRow, facts: Facts, view: View) -> Cause:
    pod = facts.pod
    return Cause(
        reason=row.reason(facts),
        rank=facts.rank,
        pod=pod.name if pod else pod_name(view.job.metadata.name, *view.members[facts.node_rank]),
        node=_node_of(view, facts.node_rank, pod),
        exit_code=facts.code,
        message=_message(facts, row.reason(facts)),
        consequence=row.consequence,
        gpu_fault=facts.gpu_fault if row.reason(facts) is Reason.GPU_FAULT else None,
    )


def _node_of(view: View, node_rank: int, pod: ObservedPod | None) -> str | None:
    """Return the node of a pod; for a deleted pod, the one that the ledger recorded."""
    if pod is not None:
        return pod.node
    entry = current(view.job.status)
    nodes = entry.pod_nodes if entry is not None and entry.attempt == view.attempt else None
    return nodes[node_rank] if nodes is not None and node_rank < len(nodes) else None


def _message(facts: Facts, reason: Reason) -> str:
    """Return the last output of the rank, or else what the cluster reports; and sidecars that failed before it."""
    text = facts.last_output.strip() or _cluster_message(facts, reason)
    if reason is Reason.GPU_FAULT and facts.gpu_fault is not None:
        text = f"{facts.gpu_fault.message}: {text}" if text else facts.gpu_fault.message
    failure = facts.pod.sidecar_failure if facts.pod is not None else None
    return " ".join(part for part in (text, f"(before that, {failure})" if failure else "") if part)


def _cluster_message(facts: Facts, reason: Reason) -> str:
    """Return what the cluster reports in addition to the reason, for a rank without output."""
    pod = facts.pod
    if pod is None:
        return ""
    code = describe(facts.code) if facts.code is not None else None
    # The runtime's reason Error only repeats that the exit code is not 0.
    parts = [part for part in (pod.disruption, pod.reason, code) if part and part not in (reason, "Error")]
    details = pod.init_failure or pod.message
    return ": ".join(text for text in (", ".join(parts), details) if text)
