"""Why an attempt ended: the one table from what is observed of a pod to a cause, and the choice among several pods.

Called by `endings`. In a gang one end is followed by others within a second; the table's order is the order of belief,
and a row that is marked as a consequence is believed only when nothing better shows (see `endings`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_contract.exit_codes import ExitCode, describe
from finetune_contract.timeouts import COLLECTIVE_TIMEOUT
from finetune_operator.api.names import pod_name
from finetune_operator.api.reasons import REASONS, CountsAs, Reason
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.types import WELL, ObservedNode, ObservedPod, PodPhase
from finetune_operator.plan.model.view import View, has_ended

SIGTERM_EXIT = 143
OUT_OF_MEMORY_WORDS = ("out of memory", "memoryerror", "cannot allocate memory", "can't allocate memory")
"""What CUDA, Python, the C library and torch's allocator say when there is none left."""
FABRIC_WORDS = (
    *("distbackenderror", "distnetworkerror", "ncclsystemerror", "ncclremoteerror", "unhandled nccl error"),
    *("nccl error", "nccl communicator was aborted", "watchdog caught collective operation timeout"),
    *("gloo/transport", "connection closed by peer", "connection reset by peer", "oneccl", "ccl_error"),
)
"""What torch, NCCL, gloo and oneCCL say of a peer or a network that is lost, where no code of ours does."""
KUBELET_SHUTDOWN = frozenset({"Preempting", "Shutdown", "NodeShutdown", "Terminated", "TerminatedByKubelet"})
"""status.reason of pods that a kubelet ended for the node's sake."""


@dataclass(frozen=True)
class Facts:
    """What is known of one node rank of the gang."""

    node_rank: int
    rank: int
    """The rank of the whole world that ended first there; the node's first one where none did."""
    pod: ObservedPod | None
    """None: gone from a gang that was complete."""
    code: int | None = None
    """How the pod, or the first rank of it, ended."""
    notice: bool = False
    """Whether its supervisor has been told to stop."""
    last_words: str = ""
    met_nobody: bool = False
    """Whether the pods of the attempt have not all been up together, or came too late for those that waited."""
    stayed_behind: bool = False
    """Whether it was kept for the attempt, and ended without having come to it."""
    node: ObservedNode = WELL
    """What is known of its node, where that is not simply well."""


@dataclass(frozen=True)
class Row:
    """One row of the table: when it applies, and the reason that it gives."""

    applies: Callable[[Facts], bool]
    reason: Callable[[Facts], Reason]
    consequence: bool = False
    """Whether something else, on this pod or another one, must have come before."""


@dataclass(frozen=True)
class Cause:
    """Why the attempt ended, as the ledger keeps it."""

    reason: Reason
    rank: int
    pod: str
    node: str | None = None
    exit_code: int | None = None
    last_words: str = ""
    consequence: bool = False

    @property
    def counts_as(self) -> CountsAs | None:
        """What the end is counted as; None: nothing."""
        return REASONS[self.reason].counts_as


def _always(reason: Reason) -> Callable[[Facts], Reason]:
    return lambda _: reason


def _code(*codes: int) -> Callable[[Facts], bool]:
    return lambda facts: facts.code in codes


def _pod(test: Callable[[ObservedPod], bool]) -> Callable[[Facts], bool]:
    return lambda facts: facts.pod is not None and test(facts.pod)


def _disruption(facts: Facts) -> Reason:
    """Kubernetes' own word for who takes the pod away, where it is one that we document."""
    word = facts.pod.disruption if facts.pod is not None else None
    return Reason(word) if word in DISRUPTIONS else Reason.PREEMPTED


def _says(facts: Facts, words: tuple[str, ...]) -> bool:
    """Whether the last words hold one of these."""
    last_words = facts.last_words.lower()
    return any(word in last_words for word in words)


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
"""Reasons that the cluster itself gives for taking a pod away; nothing that the operator does looks like them."""

TABLE: tuple[Row, ...] = (
    # What would end every further attempt in the same way is said first, whatever else befell the gang.
    Row(_code(ExitCode.CONFIG), _always(Reason.CONFIGURATION_ERROR)),
    Row(_code(ExitCode.DATA), _always(Reason.DATA_ERROR)),
    # Capacity, by the cluster's own word. It comes before exit codes: a save on notice may fail in many ways.
    Row(_pod(lambda pod: pod.disruption is not None), _disruption),
    Row(_pod(lambda pod: pod.reason in KUBELET_SHUTDOWN), _always(Reason.TERMINATION_BY_KUBELET)),
    Row(_pod(lambda pod: pod.reason == "NodeLost"), _always(Reason.NODE_LOST)),
    # Gone before its last words were read: what was known of it before tells how.
    Row(lambda facts: facts.pod is None and facts.notice, _always(Reason.PREEMPTED)),
    Row(lambda facts: facts.pod is None and facts.node.leaving != "", _always(Reason.PREEMPTED)),
    Row(lambda facts: facts.pod is None and (facts.node.lost or facts.node.gone), _always(Reason.NODE_LOST)),
    Row(lambda facts: facts.pod is None, _always(Reason.POD_LOST)),
    Row(lambda facts: facts.stayed_behind, _always(Reason.POD_LOST)),
    # The operator deletes pods only of attempts that have ended: this was somebody else.
    Row(_pod(lambda pod: pod.deleted_at is not None), _always(Reason.POD_DELETED)),
    # The program. A kubelet that is short of something says DisruptionTarget, above; an eviction without that is for
    # the pod's own excess.
    Row(_pod(lambda pod: pod.reason == "Evicted"), _always(Reason.EVICTED)),
    Row(_pod(lambda pod: pod.reason == "OOMKilled"), _always(Reason.OUT_OF_MEMORY)),
    Row(lambda facts: _says(facts, OUT_OF_MEMORY_WORDS), _always(Reason.OUT_OF_MEMORY)),
    Row(_code(ExitCode.STORAGE), _always(Reason.STORAGE_ERROR)),
    Row(_code(ExitCode.STALE), _always(Reason.CHECKPOINT_STALE)),
    Row(_code(ExitCode.SUPERSEDED), _always(Reason.SUPERSEDED)),
    # Told to stop by someone who has not shown yet: perhaps another pod of the gang.
    Row(_code(ExitCode.SAVED), _always(Reason.NOTICE_SAVED), consequence=True),
    Row(_code(SIGTERM_EXIT), _always(Reason.PREEMPTED), consequence=True),
    Row(lambda facts: facts.notice, _always(Reason.PREEMPTED), consequence=True),
    # Ranks that gave up waiting for a pod that had no node or image yet: there was no peer to lose.
    Row(lambda facts: facts.code == ExitCode.FABRIC and facts.met_nobody, _always(Reason.PODS_LATE), consequence=True),
    # A peer was lost in a collective: that peer's own end is the cause.
    Row(_code(ExitCode.FABRIC), _always(Reason.FABRIC_ERROR), consequence=True),
    Row(
        lambda facts: facts.code not in (None, ExitCode.DONE) and _says(facts, FABRIC_WORDS),
        _always(Reason.FABRIC_ERROR),
        consequence=True,
    ),
    Row(lambda facts: facts.code not in (None, ExitCode.DONE), _always(Reason.PROCESS_FAILED)),
    Row(_pod(lambda pod: pod.phase is PodPhase.FAILED), _always(Reason.PROCESS_FAILED)),
)
"""First row that applies to a pod: its sign. Lowest row among the pods: the cause of the attempt's end."""


def find_cause(view: View, gang_complete: bool) -> Cause | None:
    """Find what ended the attempt, or is about to end it; None where nothing is wrong.

    Among pods of the same row the one that ended first is the cause, then the one of the lowest rank.
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
    """Find a pod that should run, and has not been heard since its peers lost it: its machine no longer answers.

    None where nobody has spoken since: then it is the coordinator that is out of reach.
    """
    heard = {rank for rank, received in view.beats.items() if received.received_at >= since}
    gang = _gang(view, gang_complete=True)
    silent = [facts for facts in gang if facts.node_rank not in heard and _should_speak(facts.pod)]
    # A pod that has ended has spoken, too: its node told of it.
    spoke = heard or any(facts.pod is not None and has_ended(facts.pod) for facts in gang)
    if not spoke or not silent:
        return None
    return _cause(Row(lambda _: True, _always(Reason.NODE_LOST)), silent[0], view)


def _should_speak(pod: ObservedPod | None) -> bool:
    return pod is not None and pod.phase is PodPhase.RUNNING and not has_ended(pod)


def _weight(row: Row, index: int) -> tuple[bool, int]:
    return row.consequence, index


def _ended_at(facts: Facts, view: View) -> float:
    ended_at = facts.pod.finished_at if facts.pod is not None else None
    return (ended_at or view.now).timestamp()


def _gang(view: View, gang_complete: bool) -> list[Facts]:
    """Facts of every node rank that is there, or should be, and has not done all that was asked."""
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
    return Facts(
        node_rank=node_rank,
        rank=first.rank if first else node_rank * view.spec.topology.processes_per_node,
        pod=pod,
        code=code,
        notice=bool((beat and beat.notice) or (termination and termination.notice)),
        last_words=first.last_words if first else "",
        met_nobody=_has_never_met(view),
        stayed_behind=termination is not None and termination.attempt < view.attempt,
        node=view.observed.nodes.get(_node_of(view, node_rank, pod) or "", WELL),
    )


def _has_never_met(view: View) -> bool:
    """Whether ranks that gave up can blame the wait for pods.

    They give up after `COLLECTIVE_TIMEOUT` from the start of their own pod. Where more of that went into waiting for
    other pods than for these pods' ranks, a peer was on its way.
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
    """Whether a rank waits in vain for pods that are still to come: nothing has ended, and nothing restarts.

    Once they run, the attempt ends, and the next one begins with all of them.
    """
    pod = facts.pod
    if pod is None or has_ended(pod) or facts.code != ExitCode.FABRIC or not facts.met_nobody:
        return False
    return any(other.phase is PodPhase.PENDING for other in view.pods.values())


def _cause(row: Row, facts: Facts, view: View) -> Cause:
    pod = facts.pod
    return Cause(
        reason=row.reason(facts),
        rank=facts.rank,
        pod=pod.name if pod else pod_name(view.job.metadata.name, *view.members[facts.node_rank]),
        node=_node_of(view, facts.node_rank, pod),
        exit_code=facts.code,
        last_words=facts.last_words.strip() or _cluster_words(facts, row.reason(facts)),
        consequence=row.consequence,
    )


def _node_of(view: View, node_rank: int, pod: ObservedPod | None) -> str | None:
    """Where a pod is, or was where it is gone."""
    if pod is not None:
        return pod.node
    entry = current(view.job.status)
    nodes = entry.pod_nodes if entry is not None and entry.attempt == view.attempt else None
    return nodes[node_rank] if nodes is not None and node_rank < len(nodes) else None


def _cluster_words(facts: Facts, reason: Reason) -> str:
    """What the cluster says, where no rank said anything and the reason does not say it already."""
    if facts.pod is None:
        return ""
    words = [facts.pod.disruption, facts.pod.reason, describe(facts.code) if facts.code is not None else None]
    return ", ".join(word for word in words if word and word != reason)
