"""Turn a network failure into a preemption if a node of the attempt proves to be lost.

A node that fails suddenly sends nothing, and the control plane marks it as lost only after the node monitor's grace
period (40-50 s by default). The restart does not wait for that; the ledger is corrected when the node is marked. Only
a job that has spent its failures waits that long before it fails.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished

NODE_MONITOR_DELAY = timedelta(seconds=60)
"""Time within which the control plane marks a failed node as lost."""


def reclassify(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Count an end as a preemption if a node of the attempt was lost at the same time."""
    if is_finished(status):
        return status
    for index in range(max(0, len(status.attempts) - 2), len(status.attempts)):
        entry = status.attempts[index]
        rank = _lost_rank(view, entry)
        if rank is not None:
            return _correct(view, status, index, rank)
    return status


def may_be_preemption(view: View, entry: AttemptStatus) -> bool:
    """Return whether the end of an attempt may still be reclassified."""
    until = undecided_until(entry)
    return until is not None and view.now < until


def undecided_until(entry: AttemptStatus | None) -> datetime | None:
    """Return until when the control plane may mark a node of the attempt as lost; None: the cause is certain."""
    if entry is None or entry.reason != Reason.FABRIC_ERROR or entry.ended_at is None or not entry.pod_nodes:
        return None
    return entry.ended_at + NODE_MONITOR_DELAY


def _lost_rank(view: View, entry: AttemptStatus) -> int | None:
    """Return the node rank whose node is lost; None if no lost node explains the end."""
    until = undecided_until(entry)
    if until is None or view.now > until + NODE_MONITOR_DELAY:
        return None
    states = (view.observed.nodes.get(node) for node in entry.pod_nodes or ())
    lost = (rank for rank, state in enumerate(states) if state is not None and (state.lost or state.gone))
    return next(lost, None)


def _correct(view: View, status: FineTuneJobStatus, index: int, node_rank: int) -> FineTuneJobStatus:
    entry, tally = status.attempts[index], status.tally
    assert entry.pod_nodes is not None
    corrected = revise(
        entry,
        reason=Reason.NODE_LOST.value,
        counts_as=CountsAs.PREEMPTION.value,
        rank=node_rank * view.spec.topology.processes_per_node,
        node=entry.pod_nodes[node_rank],
        pod=None,
        exit_code=None,
        pod_nodes=None,
    )
    tally = revise(
        tally,
        failures_since_checkpoint=max(0, tally.failures_since_checkpoint - 1),
        failures_at_step=max(0, tally.failures_at_step - 1),
    )
    attempts = (*status.attempts[:index], corrected, *status.attempts[index + 1 :])
    changed = revise(status, attempts=attempts, tally=tally, failures=status.failures - 1)
    return revise(changed, preemptions=status.preemptions + 1)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when an undecided end becomes certain."""
    entry = current(status)
    return undecided_until(entry) if entry is not None and not is_finished(status) else None


POLICY = Policy("reclassify", decide=reclassify, wake=wake)
