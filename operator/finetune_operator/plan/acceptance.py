"""Whether the spec can be run: the condition Accepted. A job that is not accepted makes nothing.

The same rules are in the CRD; they are checked again here, because a job may be older than a rule, and on the local
cluster nobody else does.
"""

from __future__ import annotations

from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.api.words import ConditionType, Reason
from finetune_operator.build import build_pod
from finetune_operator.build.merge import MergeError
from finetune_operator.plan.conditions import make, put
from finetune_operator.plan.revise import revise
from finetune_operator.plan.unsupported import find_unsupported
from finetune_operator.plan.view import View, is_finished


def check(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the condition Accepted, for the generation of the spec that was looked at."""
    if is_finished(status):
        return status
    reason, message = _judge(view)
    accepted = make(view, ConditionType.ACCEPTED, reason is Reason.ACCEPTED, reason.value, message)
    return revise(put(status, accepted), observed_generation=view.job.metadata.generation)


def _judge(view: View) -> tuple[Reason, str]:
    if broken := _template_fault(view):
        return Reason.INVALID_SPEC, broken
    if unsupported := find_unsupported(view.spec, view.settings):
        return Reason.NOT_SUPPORTED, " ".join(unsupported)
    return Reason.ACCEPTED, "the spec can be run"


def _template_fault(view: View) -> str | None:
    try:
        build_pod(view.job, 1, 0, view.settings)
    except MergeError as error:
        return f"spec.podTemplate: {error}"
    return None
