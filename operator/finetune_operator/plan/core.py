"""The decision of one pass: all policies in their order. Pure: no clock, no socket, no file."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from finetune_operator.api.job import FineTuneJob, FineTuneJobStatus
from finetune_operator.plan.model.types import Action, Observed, Plan
from finetune_operator.plan.model.view import View, earliest
from finetune_operator.plan.policies import (
    acceptance,
    attempts,
    budget,
    capacity,
    cleanup,
    deadline,
    elastic,
    endings,
    finish,
    gang,
    hangs,
    in_place,
    nodes,
    reclassify,
    regroup,
    standby,
    stragglers,
    suspend,
    ttl,
)
from finetune_operator.plan.report import conditions, events, goodput, phase, progress, timing
from finetune_operator.settings import Settings

Policy = Callable[[View, FineTuneJobStatus], FineTuneJobStatus]

POLICIES: tuple[Policy, ...] = (
    acceptance.check,  # Can the spec be run?
    suspend.resume,  # How long was it suspended?
    progress.read,  # How far is it?
    gang.see_complete,  # Have all its pods been there?
    finish.judge_success,  # Is all done?
    deadline.judge,  # Is its time over?
    suspend.stop,  # Is it to stop for now?
    hangs.judge,  # Does it stand still?
    stragglers.judge,  # Does it wait for a pod that nobody hears of?
    endings.see_end,  # Has the attempt ended, and why?
    elastic.shrink,  # Will fewer nodes do?
    capacity.fall_back,  # Will any nodes do?
    regroup.judge,  # Is there better capacity?
    reclassify.look,  # Was a lost peer's machine lost?
    budget.judge,  # Was that one failure too many?
    attempts.begin,  # May the next attempt begin?
    attempts.catch_up,  # Are there attempts that the status does not know?
    timing.measure,  # Where did the time of its start go?
    phase.describe,  # Where is it, in words?
    hangs.note,  # Does anything go on?
    conditions.derive,  # What holds, and since when?
    conditions.judge_notice,  # Is the notice long enough to save in?
    goodput.measure,  # What share of the time was of use?
)
"""Each reads the view and what the ones before it wrote, and answers for one question of the status."""

ACTIONS: tuple[Callable[[View, FineTuneJobStatus], tuple[Action, ...]], ...] = (
    gang.create_missing,
    lambda view, status: cleanup.delete_old(view, status, in_place.survivors(view, status)),
    standby.delete_unwanted,
    ttl.delete_job,
)

WAKES: tuple[Callable[[View, FineTuneJobStatus], datetime | None], ...] = (
    acceptance.wake,
    deadline.deadline,
    hangs.wake,
    stragglers.wake,
    endings.wake,
    reclassify.wake,
    attempts.wake,
    in_place.wake,
    cleanup.wake,
    elastic.wake,
    capacity.wake,
    standby.wake,
    regroup.wake,
    phase.wake,
    ttl.wake,
)
"""When each policy wants to look again although nothing happened."""


def plan(job: FineTuneJob, observed: Observed, now: datetime, settings: Settings) -> Plan:
    """Decide what a job needs now.

    Args:
        job: as stored, with the status that the last pass wrote.
        observed: the world as last seen; it may lag behind.
        now: the time, with a time zone.
        settings: the administrator's.
    """
    if job.metadata.deletion_timestamp is not None:
        # All that belongs to it goes with it, for it owns them.
        return Plan(job.status)
    view = View(job, nodes.judge(observed, now, settings), now, settings)
    status = job.status
    for policy in POLICIES:
        status = policy(view, status)
    actions = [action for decide in ACTIONS for action in decide(view, status)]
    actions += [action for action in nodes.force_delete(observed, now) if action not in actions]
    # What was due has been done in this pass.
    wakes = (nodes.wake(observed, now, settings), *(wake(view, status) for wake in WAKES))
    wake_at = earliest(time for time in wakes if time is not None and time > now)
    return Plan(
        status=status,
        actions=tuple(actions),
        events=events.between(job.status, status),
        look_again=wake_at - now if wake_at is not None else None,
    )
