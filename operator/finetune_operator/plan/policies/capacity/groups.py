"""Delete the PodGroups of earlier attempts, as soon as no pod refers to them."""

from __future__ import annotations

from finetune_operator.api.gangs import POD_GROUP
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import DeleteChild
from finetune_operator.plan.model.view import View


def delete_old(view: View, status: FineTuneJobStatus) -> tuple[DeleteChild, ...]:
    """Return the PodGroups to delete. A pod that an in-place recovery keeps belongs to that of an earlier attempt."""
    used = {pod.attempt for pod in view.raw.pods} | {view.attempt, status.attempt}
    groups = (child for child in view.observed.children if child.kind == POD_GROUP)
    return tuple(DeleteChild(group) for group in groups if group.attempt not in used)


POLICY = Policy("groups", act=delete_old)
