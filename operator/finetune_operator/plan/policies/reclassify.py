"""A lost peer whose machine turns out to be lost: the failure of the fabric was a preemption.

A machine that dies suddenly says nothing, and the control plane misses its node only after the node monitor's grace
period (40-50 s by default). The restart does not wait for that; the ledger is put right when it is known, and a job
whose budget is spent waits so long before it fails for good.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.job import AttemptStatus, FineTuneJobStatus
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished

WORD_OF_NODE = timedelta(seconds=60)
"""By then the control plane has missed a machine that died, and said so."""


def look(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Count an end anew, where a node of the attempt was lost in the same moment."""
    if is_finished(status):
        return status
    for index in range(max(0, len(status.attempts) - 2), len(status.attempts)):
        entry = status.attempts[index]
        rank = _lost_rank(view, entry)
        if rank is not None:
            return _put_right(view, status, index, rank)
    return status


def may_turn_out(view: View, entry: AttemptStatus) -> bool:
    """Whether an end may still be found to be capacity's."""
    over_at = wait_until(entry)
    return over_at is not None and view.now < over_at


def wait_until(entry: AttemptStatus | None) -> datetime | None:
    """Until when the word of a node may come; None: the cause is certain."""
    if entry is None or entry.reason != Reason.FABRIC_ERROR or entry.ended_at is None or not entry.pod_nodes:
        return None
    return entry.ended_at + WORD_OF_NODE


def _lost_rank(view: View, entry: AttemptStatus) -> int | None:
    """The node rank whose machine is lost, where that explains the end."""
    over_at = wait_until(entry)
    if over_at is None or view.now > over_at + WORD_OF_NODE:
        return None
    states = (view.observed.nodes.get(node) for node in entry.pod_nodes or ())
    lost = (rank for rank, state in enumerate(states) if state is not None and (state.lost or state.gone))
    return next(lost, None)


def _put_right(view: View, status: FineTuneJobStatus, index: int, node_rank: int) -> FineTuneJobStatus:
    entry, tally = status.attempts[index], status.tally
    assert entry.pod_nodes is not None
    right = revise(
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
    attempts = (*status.attempts[:index], right, *status.attempts[index + 1 :])
    changed = revise(status, attempts=attempts, tally=tally, failures=status.failures - 1)
    return revise(changed, preemptions=status.preemptions + 1)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When a job that waits for the word of a node waits no longer."""
    entry = current(status)
    return wait_until(entry) if entry is not None and not is_finished(status) else None
