"""Release the nodes of an incomplete gang: some of its pods have a node, and the others cannot have one.

Such a gang trains nothing, and two of them may block each other forever. Its pods are deleted before they have held
their nodes for `Settings.gang_hold_seconds`, and all of them are requested again later (see `backoff`). This costs no
budget, and no step: the gang has not trained since it lost a pod, and what its ranks held is saved. An elastic job that
has enough pods continues with them instead (see `elastic`).
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.job import SchedulingMode
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model import gangs
from finetune_operator.plan.model.backoff import JITTER, jitter
from finetune_operator.plan.model.closing import close
from finetune_operator.plan.model.ledger import open_attempt
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.view import View


def release(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End an attempt whose incomplete gang has held nodes for too long."""
    due = wake(view, status)
    if due is None or view.now < due:
        return status
    return close(view, status, Reason.GANG_RELEASED, message=f"{describe(view)}{_why(view)}", node=_first_node(view))


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the pods that have a node must give it back."""
    entry = open_attempt(view, status)
    return release_at(view, entry) if entry is not None else None


def release_at(view: View, entry: AttemptStatus) -> datetime | None:
    """Return when to release the nodes; None: the gang holds none in vain, or is not scheduled together."""
    if gangs.mode_of(entry) is SchedulingMode.NONE:
        return None
    since = gangs.held_since(view, entry)
    if since is None:
        return None
    # The time is different for each job, and never above the limit: gangs that block each other must not release at
    # the same time.
    share = jitter(view.job.metadata.uid, entry.attempt) - JITTER
    return since + timedelta(seconds=view.settings.gang_hold_seconds) * share


def describe(view: View) -> str:
    """Return how many pods of the gang have a node."""
    return f"{len(gangs.placed(view))} of {view.num_nodes} pods have a node"


def _first_node(view: View) -> str | None:
    """Return the node that decided in which rack or zone a packed gang waited; None: the gang is not packed.

    The first pod of the next attempt avoids it, so that repeated attempts find a rack or zone with more room.
    """
    if view.spec.topology.pack is None:
        return None
    first = min(gangs.placed(view), key=lambda pod: (pod.scheduled_at or pod.created_at, pod.node_rank), default=None)
    return first.node if first is not None else None


def _why(view: View) -> str:
    """Return the first pod without a node and the scheduler's reason, or why the API server does not create it."""
    waiting = (pod for pod in view.pods.values() if pod.node is None and pod.waiting)
    if (pod := next(waiting, None)) is not None:
        return f"; {pod.name}: {pod.waiting}"
    return f"; {view.observed.refusal.message}" if view.observed.refusal is not None else ""


POLICY = Policy("incomplete", decide=release, wake=wake)
