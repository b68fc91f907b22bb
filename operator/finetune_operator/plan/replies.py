"""The reply to a supervisor's heartbeat. Pure; the coordinator of every kind of cluster uses it.

It depends only on the status and on the addresses of the pods, so an operator that has just restarted gives the same
replies as the one before it.
"""

from __future__ import annotations

from collections.abc import Callable

from finetune_contract.heartbeat import Heartbeat, NewWorld, Order, Reply
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import pod_name
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.manifests import build_target
from finetune_operator.plan.model.grace import SAVED_FOR, WITH_OWN_GRACE, is_sudden
from finetune_operator.plan.model.ledger import current, follows_gpu_fault
from finetune_operator.plan.model.view import members_of
from finetune_operator.settings import Settings

AddressOf = Callable[[str], str]
"""Returns the address of a pod of the job by its name; empty if it has none, or does not exist."""
WAITING_BEATS = 5
"""Factor by which the heartbeat interval is shorter for a supervisor whose new world may be ready at any moment."""


def reply_to(job: FineTuneJob | None, beat: Heartbeat, settings: Settings, address_of: AddressOf) -> Reply:
    """Return the reply to a heartbeat. A job that is unknown (not observed yet, or deleted) has no orders."""
    if job is None or beat.job_uid != job.metadata.uid:
        return Reply()
    # Its pod may belong to the newest attempt, even if the supervisor does not know it yet.
    rank = _rank_of(job, beat) if beat.attempt < job.status.attempt or _may_ask(beat) else None
    world = _new_world(job, rank, beat, settings, address_of) if rank is not None else None
    hurried = beat.joining or (beat.waiting and (_is_between_attempts(job) or rank is not None))
    return Reply(
        order=Order.SAVE_AND_STOP if _should_save(job, beat) else Order.CONTINUE,
        # A kept pod receives the newest attempt together with its world: it would stop if it had no world.
        attempt=None if rank is not None and world is None else job.status.attempt,
        world=world,
        peer_lost=_has_lost_peer(job, beat),
        stacks=_has_hung(job, beat.attempt),
        beat_seconds=settings.beat_seconds / WAITING_BEATS if hurried else settings.beat_seconds,
    )


def _may_ask(beat: Heartbeat) -> bool:
    """Return whether a pod asks for the address of rank 0, or may have an old one: its ranks have not met yet.

    A pod that is lost before the gang was complete is created again in the same attempt.
    """
    if beat.joining:
        return True
    is_meeting = not beat.ends and all(report.step is None for report in beat.ranks)
    return beat.master_addr is not None and is_meeting


def _has_lost_peer(job: FineTuneJob, beat: Heartbeat) -> bool:
    """Return whether the ranks wait for a lost peer. If its node vanished, their collectives take minutes to fail."""
    entry = next((entry for entry in job.status.attempts if entry.attempt == beat.attempt), None)
    if entry is None or entry.counts_as is None or beat.waiting:
        return False
    return entry.reason not in WITH_OWN_GRACE and not _should_save(job, beat)


def _has_hung(job: FineTuneJob, attempt: int) -> bool:
    """Return whether an attempt ended because of a hang."""
    return any(entry.attempt == attempt and entry.reason == Reason.HANG for entry in job.status.attempts)


def _is_between_attempts(job: FineTuneJob) -> bool:
    """Return whether the newest attempt has ended: the next one will begin soon."""
    entry = current(job.status)
    return entry is not None and entry.ended_at is not None


def _should_save(job: FineTuneJob, beat: Heartbeat) -> bool:
    """Return whether to save while all ranks run: a peer has a preemption notice, or better capacity is ready."""
    entry = current(job.status)
    if entry is None or entry.attempt != beat.attempt or entry.ended_at is None or beat.waiting:
        return False
    if entry.reason in SAVED_FOR:
        return True
    return entry.counts_as == CountsAs.PREEMPTION and not is_sudden(entry)


def _rank_of(job: FineTuneJob, beat: Heartbeat) -> int | None:
    """Return the node rank of a pod in the newest attempt; None if it does not belong to it."""
    names = [pod_name(job.metadata.name, *member) for member in members_of(job.status, job.spec)]
    return names.index(beat.pod) if beat.pod in names else None


def _new_world(
    job: FineTuneJob, rank: int, beat: Heartbeat, settings: Settings, address_of: AddressOf
) -> NewWorld | None:
    """Return the world that a pod must join; None: not yet.

    A kept pod of an older attempt receives it only when the containers of all pods run. Ranks that wait too long for a
    peer time out, and the wait for a node and its image has no known limit.
    """
    entry = current(job.status)
    if entry is None or entry.ended_at is not None or beat.attempt > entry.attempt:
        return None
    is_kept = beat.attempt < entry.attempt
    if is_kept and entry.seconds.pulling is None:
        return None
    members = members_of(job.status, job.spec)
    address = address_of(pod_name(job.metadata.name, *members[0]))
    if not address or (not is_kept and address == beat.master_addr):
        return None
    return NewWorld(
        attempt=entry.attempt,
        node_rank=rank,
        num_nodes=len(members),
        master_addr=address,
        master_port=settings.rendezvous_port,
        mtbf_seconds=entry.mtbf_seconds,
        target=build_target(job.spec).to_json(),
        check_devices=follows_gpu_fault(job.status),
    )
