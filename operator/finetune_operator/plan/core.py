"""The decision of one reconcile: run the policies of the registry in order. Pure: no clock, no socket, no file."""

from __future__ import annotations

from datetime import datetime

from finetune_operator.api import kueue
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan import registry
from finetune_operator.plan.model.types import Action, Create, Observed, PatchWorkload, Plan, ResizePod
from finetune_operator.plan.model.view import View, earliest
from finetune_operator.plan.policies import nodes
from finetune_operator.plan.policies.capacity import evictions
from finetune_operator.plan.policies.queue import request
from finetune_operator.plan.report import events
from finetune_operator.settings import Settings


def plan(job: FineTuneJob, observed: Observed, now: datetime, settings: Settings) -> Plan:
    """Decide what a job needs now.

    Args:
        job: the stored job, with the status that the previous reconcile wrote.
        observed: the last observed state of the cluster; it may be stale.
        now: the current time, with a time zone.
        settings: the administrator's settings.
    """
    if job.metadata.deletion_timestamp is not None:
        # Kubernetes deletes the job's children: the job owns them.
        return Plan(job.status)
    if job.spec.managed_by == kueue.MULTIKUEUE:
        return Plan(job.status, actions=request.act(View(job, observed, now, settings), job.status))
    corrected = evictions.mark(nodes.apply_node_state(observed, now, settings))
    view = View(job, corrected, now, settings, unadjusted=observed)
    status = job.status
    for policy in registry.POLICIES:
        status = policy.decide(view, status)
    wake_at = _wake_at(view, status)
    return Plan(
        status=status,
        actions=_actions(view, status),
        events=events.build_events(job.status, status),
        requeue_after=wake_at - now if wake_at is not None else None,
    )


def _wake_at(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return the earliest wake time in the future. This reconcile has already done what was due."""
    times = (policy.wake(view, status) for policy in registry.POLICIES)
    return earliest(time for time in times if time is not None and time > view.now)


def _actions(view: View, status: FineTuneJobStatus) -> tuple[Action, ...]:
    """Return the actions of all policies, each deletion once: two policies may delete the same pod."""
    actions: list[Action] = []
    deletions: set[Action] = set()
    for policy in registry.POLICIES:
        for action in policy.act(view, status):
            if isinstance(action, Create | PatchWorkload | ResizePod):
                actions.append(action)
            elif action not in deletions:
                deletions.add(action)
                actions.append(action)
    return tuple(actions)
