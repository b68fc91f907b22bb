"""What a supervisor is told in answer to its beat. Pure; every cluster's coordinator answers by it.

It follows from the status alone, so an operator that was just restarted says the same as the one before it.
"""

from __future__ import annotations

from finetune_contract.heartbeat import Heartbeat, NewWorld, Order, Reply
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import pod_host, pod_name
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.view import members_of
from finetune_operator.plan.policies.cleanup import SAVED_FOR, SUDDEN, WITH_OWN_GRACE
from finetune_operator.settings import Settings

WAITING_BEATS = 5
"""A supervisor that waits for its new world, which may be ready at any moment, beats so many times as often."""


def reply_to(job: FineTuneJob | None, beat: Heartbeat, settings: Settings) -> Reply:
    """Answer a beat; a job that is not known (not yet seen, or gone) has no orders."""
    if job is None or beat.job_uid != job.metadata.uid:
        return Reply()
    member, world = _is_kept(job, beat), _new_world(job, beat, settings)
    hurried = beat.waiting and (_is_between(job) or (member and beat.attempt < job.status.attempt))
    return Reply(
        order=Order.SAVE_AND_STOP if _should_save(job, beat) else Order.CONTINUE,
        # One that is kept hears of the newest attempt together with its world: without one it would stop.
        attempt=None if member and world is None and beat.attempt < job.status.attempt else job.status.attempt,
        world=world,
        peer_lost=_has_lost_peer(job, beat),
        stacks=_stood_still(job, beat.attempt),
        beat_seconds=settings.beat_seconds / WAITING_BEATS if hurried else settings.beat_seconds,
    )


def _has_lost_peer(job: FineTuneJob, beat: Heartbeat) -> bool:
    """Whether the ranks wait in vain: where a machine vanishes, nothing else tells their collectives for minutes."""
    entry = next((entry for entry in job.status.attempts if entry.attempt == beat.attempt), None)
    if entry is None or entry.counts_as is None or beat.waiting:
        return False
    return entry.reason not in WITH_OWN_GRACE and not _should_save(job, beat)


def _stood_still(job: FineTuneJob, attempt: int) -> bool:
    """Whether an attempt ended because nothing went on in it."""
    return any(entry.attempt == attempt and entry.reason == Reason.HANG for entry in job.status.attempts)


def _is_between(job: FineTuneJob) -> bool:
    """Whether the newest attempt has ended: its successor is near."""
    entry = current(job.status)
    return entry is not None and entry.ended_at is not None


def _should_save(job: FineTuneJob, beat: Heartbeat) -> bool:
    """Whether a peer has notice, or better capacity is at hand: the state is saved while all are there."""
    entry = current(job.status)
    if entry is None or entry.attempt != beat.attempt or entry.ended_at is None or beat.waiting:
        return False
    if entry.reason in SAVED_FOR:
        return True
    return entry.counts_as == CountsAs.PREEMPTION and entry.reason not in SUDDEN


def _is_kept(job: FineTuneJob, beat: Heartbeat) -> bool:
    """Whether a pod belongs to the newest attempt, although it may not know."""
    return _rank_of(job, beat) is not None


def _rank_of(job: FineTuneJob, beat: Heartbeat) -> int | None:
    names = [pod_name(job.metadata.name, *member) for member in members_of(job.status, job.spec)]
    return names.index(beat.pod) if beat.pod in names else None


def _new_world(job: FineTuneJob, beat: Heartbeat, settings: Settings) -> NewWorld | None:
    """Where a pod belongs that was kept, until it has come there; None: it has, or it was not kept.

    It is told only once the containers of all run: ranks that wait for a peer too long give up, and until a pod has
    a node and its image, nobody knows for how long.
    """
    entry, name = current(job.status), job.metadata.name
    if entry is None or entry.ended_at is not None or beat.attempt >= entry.attempt or entry.seconds.pulling is None:
        return None
    rank, members = _rank_of(job, beat), members_of(job.status, job.spec)
    if rank is None:
        return None
    return NewWorld(
        attempt=entry.attempt,
        node_rank=rank,
        num_nodes=len(members),
        master_addr=pod_host(name, *members[0], job.metadata.namespace),
        master_port=settings.rendezvous_port,
        mtbf_seconds=entry.mtbf_seconds,
    )
