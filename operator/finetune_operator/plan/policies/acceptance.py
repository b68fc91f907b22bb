"""Whether the spec can be run: the condition Accepted. A job that is not accepted makes nothing.

The CRD holds the same rules. They are checked again here, because a job may have been stored under an older
definition, and because some things only the operator knows: its own settings, and what its trainer can do. And some
only the cluster knows: whether it takes the pods that podTemplate makes.
"""

from __future__ import annotations

from datetime import datetime

from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.api.rules.supported import find_missing
from finetune_operator.api.validate import broken_rules
from finetune_operator.manifests import build_pod
from finetune_operator.manifests.merge import MergeError
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies import gang
from finetune_operator.plan.policies.unsupported import find_unsupported
from finetune_operator.plan.report.conditions import find, make, put


def check(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the condition Accepted, for the generation of the spec that was looked at.

    What was accepted once stays so until the spec changes. What was refused is looked at in every pass: a newer
    operator may take it.
    """
    if is_finished(status):
        return status
    refusal = _refusal(view, status)
    if refusal is None and _is_accepted(view, status):
        return status
    reason, message = _judge(view) if refusal is None else (Reason.FAILED_CREATE, refusal)
    accepted = make(view, ConditionType.ACCEPTED, reason is Reason.ACCEPTED, reason.value, message)
    return revise(put(status, accepted), observed_generation=view.job.metadata.generation)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When what the cluster refused is to be tried again."""
    refusal = view.observed.refusal
    return refusal.hold_until if refusal is not None and not is_finished(status) else None


def _refusal(view: View, status: FineTuneJobStatus) -> str | None:
    """Why the cluster takes no pod of this spec. It holds until it has taken one, also where this was said to another
    operator, before this one began; where none is lacking, only while there is no use in asking again."""
    told = view.observed.refusal
    if told is not None and told.hold_until is not None and (view.holds_back or gang.missing(view, status)):
        return told.sentence
    old = find(status, ConditionType.ACCEPTED)
    if old is None or old.reason != Reason.FAILED_CREATE or old.observed_generation != view.job.metadata.generation:
        return None
    return old.message if gang.missing(view, status) else None


def _is_accepted(view: View, status: FineTuneJobStatus) -> bool:
    condition = find(status, ConditionType.ACCEPTED)
    if condition is None or condition.status != "True":
        return False
    return condition.observed_generation == status.observed_generation == view.job.metadata.generation


def _judge(view: View) -> tuple[Reason, str]:
    """All that is wrong, in one message: nobody should have to apply a manifest twice to hear the second sentence."""
    if broken := [str(problem) for problem in broken_rules(view.job)] + _template_faults(view):
        return Reason.INVALID_SPEC, _sentences(broken)
    if missing := [*find_missing(view.spec), *find_unsupported(view.spec, view.settings)]:
        return Reason.NOT_SUPPORTED, _sentences(missing)
    return Reason.ACCEPTED, "the spec can be run"


def _template_faults(view: View) -> list[str]:
    try:
        build_pod(view.job, 1, 0, view.settings)
    except MergeError as error:
        return [f"spec.podTemplate: {error}"]
    return []


def _sentences(problems: list[str]) -> str:
    return " ".join(problem.rstrip(".") + "." for problem in problems)
