"""Scheduling gates: the scheduler sees no pod of a gang before all of them exist.

Without them, the first pods of a gang take nodes while a quota or a webhook refuses the others. The gates of all pods
are removed in one reconcile. `incomplete` releases a gang that does not fit nevertheless.
"""

from __future__ import annotations

from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model import gangs
from finetune_operator.plan.model.ledger import open_attempt
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import OpenGate
from finetune_operator.plan.model.view import View


def open_all(view: View, status: FineTuneJobStatus) -> tuple[OpenGate, ...]:
    """Return the gates to remove: none, or those of all pods of the attempt.

    An elastic job does not wait for pods that the API server refuses.
    """
    entry = open_attempt(view, status)
    gated = [pod for pod in view.pods.values() if pod.gated and pod.deleted_at is None]
    if entry is None or not gated:
        return ()
    enough = gangs.least(view) if view.observed.refusal is not None else view.num_nodes
    return tuple(OpenGate(pod.name, pod.uid) for pod in gated) if len(view.pods) >= enough else ()


POLICY = Policy("gates", act=open_all)
