"""Decides whether the spec can be run: the condition Accepted. Nothing is created for a job that is not accepted.

The CRD contains the same rules. They are checked again here, because the job may have been stored under an older
definition. Some checks are possible only here: against the operator's settings, and against what this version's
trainer supports. Only the cluster can check the pods that podTemplate produces; see `_refusal`.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from finetune_contract.outputs.request import written_by_export
from finetune_operator.api import gangs, kueue
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import FineTuneJob, Pack, SchedulingMode
from finetune_operator.api.reasons import Reason
from finetune_operator.api.rules.supported import find_missing
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.api.validate import broken_rules
from finetune_operator.manifests import build_pod
from finetune_operator.manifests.merge import MergeError
from finetune_operator.manifests.targets import find_misplaced_outputs
from finetune_operator.plan.model.conditions import build, find, put
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies import gang
from finetune_operator.settings import Settings

NO_STORAGE = (
    "spec.checkpoint.storage: the pods need a shared volume or a bucket; write persistentVolumeClaim, hostPath, nfs "
    "or bucket."
)


NO_EXPORT_IMAGE = (
    "spec.outputs: {format} needs an operator with an image for exports (trainer.images.export in the values of its "
    "chart); write another format, e.g. diffusers."
)
NO_QUEUES = "a queue needs an operator that uses Kueue (kueue.enabled in the values of its chart); leave the queue out."
NO_RACKS = (
    "spec.topology.pack: the operator knows no label of racks (topology.rackLabel in the values of its chart); write "
    "pack: zone, or leave pack out."
)
NO_CLAIMS = (
    "spec.topology.gpuClaimTemplateName: the cluster does not serve ResourceClaims (that needs Kubernetes 1.34 or "
    "newer, or the feature gate DynamicResourceAllocation); leave gpuClaimTemplateName out."
)
NO_KUEUE = f"the cluster does not serve Kueue's API {kueue.API_VERSION}; install Kueue, or leave the queue out."


NO_GANGS = (
    "spec.scheduling: {mode} needs an operator that schedules gangs (gangs.enabled in the values of its chart); write "
    "auto or none."
)
NO_GROUPS = "spec.scheduling: the cluster does not serve a PodGroup of {versions}; install {product}, or write auto."
WITHOUT_GANGS = frozenset({SchedulingMode.AUTO, SchedulingMode.NONE})
"""Values of spec.scheduling that any operator supports."""


def find_unsupported(
    job: FineTuneJob,
    settings: Settings,
    *,
    queues_served: bool = True,
    gang_apis: Collection[SchedulingMode] | None = None,
    claims_served: bool = True,
) -> list[str]:
    """Return a message for each requested feature that is not available.

    Args:
        job: the job.
        settings: the settings of the operator that will run it.
        queues_served: whether the cluster serves Kueue's API.
        gang_apis: the kinds of PodGroups that the cluster serves; None: not known.
        claims_served: whether the cluster serves ResourceClaims.
    """
    messages = []
    mode = job.spec.scheduling
    if mode not in WITHOUT_GANGS and not settings.gangs:
        messages.append(NO_GANGS.format(mode=mode.value))
    elif mode in gangs.SERVED_VERSIONS and gang_apis is not None and mode not in gang_apis:
        messages.append(describe_missing_groups(mode))
    if kueue.queue_of(job) is not None and not (settings.kueue and queues_served):
        field = "spec.queueName" if job.spec.queue_name else f"the label {kueue.QUEUE_LABEL}"
        messages.append(f"{field}: {NO_KUEUE if settings.kueue else NO_QUEUES}")
    if job.spec.topology.gpu_claim_template_name is not None and not claims_served:
        messages.append(NO_CLAIMS)
    if job.spec.topology.pack is Pack.RACK and not settings.rack_label:
        messages.append(NO_RACKS)
    if not settings.trainer_image_export and (found := written_by_export(job.spec.outputs)):
        messages.append(NO_EXPORT_IMAGE.format(format=found[0].format.value))
    if settings.require_storage and job.spec.checkpoint.storage is None:
        messages.append(NO_STORAGE)
    return messages


def describe_missing_groups(mode: SchedulingMode) -> str:
    """Return the message for a kind of PodGroup that the cluster does not serve."""
    versions = " or ".join(gangs.SERVED_VERSIONS[mode])
    return NO_GROUPS.format(versions=versions, product=gangs.PRODUCTS[mode])


def check_spec(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the condition Accepted for the current generation of the spec.

    An accepted spec stays accepted until it changes. A refused one is checked in every reconcile: a newer operator
    may accept it.
    """
    if is_finished(status):
        return status
    refusal = _refusal(view, status)
    if refusal is None and _is_accepted(view, status):
        return status
    reason, message = _evaluate(view) if refusal is None else (Reason.FAILED_CREATE, refusal)
    accepted = build(view, ConditionType.ACCEPTED, reason is Reason.ACCEPTED, reason.value, message)
    return revise(put(status, accepted), observed_generation=view.job.metadata.generation)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when to create again what the cluster refused."""
    refusal = view.observed.refusal
    return refusal.hold_until if refusal is not None and not is_finished(status) else None


def _refusal(view: View, status: FineTuneJobStatus) -> str | None:
    """Return why the cluster accepts no pod of this spec; None if it does, or has received no request yet.

    While pods are missing, the refusal stays valid until the cluster accepts one, also if an earlier operator process
    received it. With no pod missing, it is valid only until it is time to try again.
    """
    latest = view.observed.refusal
    if (
        latest is not None
        and latest.hold_until is not None
        and (view.creation_on_hold or gang.find_missing(view, status))
    ):
        return latest.message
    old = find(status, ConditionType.ACCEPTED)
    if old is None or old.reason != Reason.FAILED_CREATE or old.observed_generation != view.job.metadata.generation:
        return None
    return old.message if gang.find_missing(view, status) else None


def _is_accepted(view: View, status: FineTuneJobStatus) -> bool:
    condition = find(status, ConditionType.ACCEPTED)
    if condition is None or condition.status != "True":
        return False
    return condition.observed_generation == status.observed_generation == view.job.metadata.generation


def _evaluate(view: View) -> tuple[Reason, str]:
    """Return all faults of the spec in one message, so that a user can fix all of them in one edit."""
    broken = [str(problem) for problem in broken_rules(view.job)] + find_pod_faults(view.job, view.settings)
    broken += filter(None, [kueue.find_contradiction(view.job)])
    if broken:
        return Reason.INVALID_SPEC, _join(broken)
    observed = view.observed
    missing = find_unsupported(
        view.job,
        view.settings,
        queues_served=observed.queues_served,
        gang_apis=observed.gang_apis,
        claims_served=observed.claims_served,
    )
    if missing := [*find_missing(view.spec), *missing]:
        return Reason.NOT_SUPPORTED, _join(missing)
    return Reason.ACCEPTED, "the spec is valid and supported"


def find_pod_faults(job: FineTuneJob, settings: Settings) -> list[str]:
    """Return a message for each fault of the pods that a valid spec produces: of the template, and of the outputs."""
    try:
        pod = build_pod(job, 1, 0, settings)
    except MergeError as error:
        return [f"spec.podTemplate: {error}"]
    return list(find_misplaced_outputs(job, pod)) if settings.outputs_on_volumes else []


def _join(problems: list[str]) -> str:
    return " ".join(problem.rstrip(".") + "." for problem in problems)


POLICY = Policy("acceptance", decide=check_spec, wake=wake)
