"""What a supervisor is told in answer to its beat. Pure; every cluster's coordinator answers by it.

It follows from the status alone, so an operator that was just restarted says the same as the one before it.
"""

from __future__ import annotations

from finetune_contract.beat import Beat, NewWorld, Order, Reply
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import pod_host, pod_name
from finetune_operator.api.words import CountsAs
from finetune_operator.plan.ledger import current
from finetune_operator.plan.restart import SUDDEN
from finetune_operator.settings import Settings


def reply_to(job: FineTuneJob | None, beat: Beat, settings: Settings) -> Reply:
    """Answer a beat; a job that is not known (not yet seen, or gone) has no orders."""
    if job is None or beat.job_uid != job.metadata.uid:
        return Reply()
    return Reply(
        order=Order.SAVE_AND_STOP if _should_save(job, beat) else Order.CONTINUE,
        attempt=job.status.attempt,
        world=_new_world(job, beat, settings),
        beat_seconds=settings.beat_seconds,
    )


def _should_save(job: FineTuneJob, beat: Beat) -> bool:
    """Whether a peer has notice: the state is saved while all are there, whoever else may lose its machine."""
    entry = current(job.status)
    if entry is None or entry.attempt != beat.attempt or entry.ended_at is None:
        return False
    return entry.counts_as == CountsAs.PREEMPTION and entry.reason not in SUDDEN


def _new_world(job: FineTuneJob, beat: Beat, settings: Settings) -> NewWorld | None:
    """Where a pod belongs that was kept, until it has come there; None: it has, or it was not kept."""
    entry, name = current(job.status), job.metadata.name
    if entry is None or entry.ended_at is not None or beat.attempt >= entry.attempt:
        return None
    attempts = entry.pod_attempts
    if beat.node_rank >= len(attempts) or beat.pod != pod_name(name, attempts[beat.node_rank], beat.node_rank):
        return None
    return NewWorld(
        attempt=entry.attempt,
        node_rank=beat.node_rank,
        num_nodes=len(attempts),
        master_addr=pod_host(name, attempts[0], 0, job.metadata.namespace),
        master_port=settings.rendezvous_port,
    )
