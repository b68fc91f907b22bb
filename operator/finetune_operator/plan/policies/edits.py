"""Edits of the fields that only new pods read, such as podTemplate: when they take effect, and what the job shows.

While pods of an attempt still wait, for example for an image with a wrong name, the attempt ends and the next one
creates all pods from the new spec. A gang that runs is not interrupted: the condition PodsOutdated shows that its pods
do not contain the edit yet, and the next attempt replaces all of them.
"""

from __future__ import annotations

from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.manifests import hash_target
from finetune_operator.plan.model.closing import close
from finetune_operator.plan.model.conditions import build, find, is_true, put
from finetune_operator.plan.model.ledger import open_attempt, open_entry
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.view import View, is_finished

OUTDATED = (
    "the spec was edited after the pods were created; the edit takes effect with the next attempt; "
    "to apply it now, set spec.suspend to true and, when the job is suspended, to false"
)
UP_TO_DATE = "all pods were created from the current spec"


def apply_edit(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End an attempt whose pods have not all started if the spec was edited since they were created."""
    entry = open_attempt(view, status)
    if entry is None or entry.seconds.pulling is not None or view.all_up() or view.spec.suspend:
        return status
    if not is_true(status, ConditionType.ACCEPTED) or not view.has_outdated_pods:
        return status
    return close(view, status, Reason.SPEC_EDITED)


def apply_target(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End an attempt if steps, epochs or outputs were edited. Its ranks save, and the next attempt keeps its pods."""
    entry = open_attempt(view, status)
    if entry is None or entry.target is None or view.spec.suspend or not is_true(status, ConditionType.ACCEPTED):
        return status
    if entry.target == hash_target(view.spec) or all(view.is_done(rank) for rank in range(view.num_nodes)):
        return status
    return close(view, status, Reason.TARGET_EDITED, next_nodes=view.num_nodes)


def report(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the condition PodsOutdated, unless it never was True."""
    if is_finished(status):
        return status
    kind = ConditionType.PODS_OUTDATED
    outdated = open_entry(status) is not None and status.attempt == view.attempt and view.has_outdated_pods
    if outdated:
        return put(status, build(view, kind, True, Reason.SPEC_EDITED, OUTDATED))
    if find(status, kind) is None:
        return status
    return put(status, build(view, kind, False, Reason.SPEC_APPLIED, UP_TO_DATE))


APPLY = Policy("edits", decide=apply_edit)
TARGET = Policy("edits-target", decide=apply_target)
REPORT = Policy("edits-report", decide=report)
