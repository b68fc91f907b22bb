"""The export pod: writes the outputs that the ranks do not write, and those that a user requests from a checkpoint.

The job's own export follows the training; the job succeeds when it is done. A request is an annotation of the job, and
is carried out once, also after the end of the job. There is one pod at a time, with a fixed name, so two of them never
write the same files. It repeats nothing that an earlier one has completed, so it may be replaced at any time.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from finetune_contract.exit_codes import ExitCode, describe
from finetune_contract.heartbeat import OutputState
from finetune_contract.outputs.request import ExportRequest, ExportResult
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.labels import EXPORT
from finetune_operator.api.names import config_name, export_pod_name
from finetune_operator.api.reasons import Reason
from finetune_operator.api.rules.supported import find_missing
from finetune_operator.api.status import ExportState, ExportStatus, FineTuneJobStatus, OutputStatus
from finetune_operator.api.validate import broken_rules
from finetune_operator.manifests import build_config
from finetune_operator.manifests.export_pod import build_export_pod, hash_request, uses_claim
from finetune_operator.plan.model import backoff, exporting
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.types import Action, Create, DeletePod, ObservedPod, PodPhase
from finetune_operator.plan.model.view import ENDED, FIRST_SIGNAL_EXIT, View, has_ended, is_finished
from finetune_operator.plan.policies import finish
from finetune_operator.plan.policies.acceptance import find_pod_faults, find_unsupported
from finetune_operator.plan.policies.nodes import NODE_LOST
from finetune_operator.plan.policies.retry import how_to_continue
from finetune_operator.settings import Settings

MAX_OUTPUTS = 100
"""Most outputs in the status."""
FINAL = frozenset({ExitCode.CONFIG, ExitCode.DATA})
"""Exit codes after which another pod would fail, too."""
OUTAGES = frozenset({ExitCode.NETWORK, ExitCode.STORAGE_OUTAGE})
"""Exit codes of outages: they do not count as failures."""


def decide(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Begin the next export, follow its pod, and end the job when its own outputs are complete."""
    status = _begin_next(view, _drop_obsolete(view, status))
    if (export := exporting.active_export(status)) is not None:
        request = _request_of(view, export)
        status = _follow(view, status, export, request) if request is not None else _end_unknown(status, export)
    if not exporting.has_trained(view, status):
        return status
    own = exporting.find_export(status, own=True)
    if exporting.own_request(view.spec) is None or (own is not None and own.state is ExportState.DONE):
        return finish.succeed(view, status)
    if own is not None and own.state is ExportState.FAILED:
        return finish.fail(view, status, Reason.EXPORT_FAILED, f"{own.message}. {how_to_continue(status)}")
    return status


def _drop_obsolete(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Drop an own export whose outputs were edited, or whose job trains again. It cannot outlive the job's failure."""
    own, request = exporting.find_export(status, own=True), exporting.own_request(view.spec)
    if own is None:
        return status
    if is_finished(status):
        if own.state not in exporting.ACTIVE:
            return status
        message = status.message or "the job has ended"
        return exporting.put_export(status, revise(own, state=ExportState.FAILED, message=message))
    # A job that continues after its failure has a failed export.
    is_same = request is not None and hash_request(request) == own.content
    is_same = is_same and exporting.has_trained(view, status)
    return status if is_same and own.state is not ExportState.FAILED else exporting.drop_own(status)


def _begin_next(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    if exporting.active_export(status) is not None:
        return status
    own = exporting.own_request(view.spec) if exporting.has_trained(view, status) else None
    if own is not None and exporting.find_export(status, own=True) is None:
        return _begin(view, status, own)
    known = exporting.find_export(status, own=False)
    try:
        request = exporting.user_request(view)
    except exporting.BadRequestError as error:
        bad = f"the annotation {EXPORT} cannot be read: {error}"
        return status if known is not None and known.message == bad else _refuse(status, "invalid", "", bad)
    if request is None or (known is not None and known.request == request.id):
        return status
    if problem := find_problem(view, request):
        return _refuse(status, request.id, hash_request(request), problem)
    return _begin(view, status, request)


def find_problem(view: View, request: ExportRequest) -> str:
    """Return what is wrong with a request; empty if it can be carried out."""
    asked = _asked(view.job, request)
    missing = find_unsupported(asked, view.settings, queues_served=view.observed.queues_served)
    return " ".join([*find_faults(view.job, request, view.settings), *missing])


def find_faults(job: FineTuneJob, request: ExportRequest, settings: Settings) -> list[str]:
    """Return a message for each fault of a request that does not depend on the cluster."""
    asked = _asked(job, request)
    problems = [*map(str, broken_rules(asked)), *find_pod_faults(asked, settings), *find_missing(asked.spec)]
    if request.step is not None and job.spec.training.script is not None:
        problems.append("step: only the files that a script has written at its end can be exported; leave step out")
    return problems


def _asked(job: FineTuneJob, request: ExportRequest) -> FineTuneJob:
    """Return the job with the outputs of a request: the same rules apply to them."""
    return job.model_copy(update={"spec": job.spec.model_copy(update={"outputs": request.outputs})})


def _refuse(status: FineTuneJobStatus, name: str, content: str, message: str) -> FineTuneJobStatus:
    refused = ExportStatus(request=name, content=content, state=ExportState.FAILED, message=message)
    return exporting.put_export(status, refused)


def _begin(view: View, status: FineTuneJobStatus, request: ExportRequest) -> FineTuneJobStatus:
    begun = ExportStatus(
        request=request.id, content=hash_request(request), step=request.step, state=ExportState.WAITING
    )
    # A job that continues after its failure still has the pod that failed.
    left = _pod_of(view, begun)
    ended = left.uid if left is not None and has_ended(left) else None
    return exporting.put_export(status, revise(begun, ended_pod=ended))


def _request_of(view: View, export: ExportStatus) -> ExportRequest | None:
    """Return the request of an export; None if it has been edited or removed."""
    if export.request == exporting.OWN:
        return exporting.own_request(view.spec)
    try:
        found = exporting.user_request(view)
    except exporting.BadRequestError:
        return None
    return found if found is not None and hash_request(found) == export.content else None


def _end_unknown(status: FineTuneJobStatus, export: ExportStatus) -> FineTuneJobStatus:
    message = f"the annotation {EXPORT} was changed before the export was done"
    return exporting.put_export(status, revise(export, state=ExportState.FAILED, message=message))


# -- the pod ----------------------------------------------------------------------------------------------------------


def _follow(view: View, status: FineTuneJobStatus, export: ExportStatus, request: ExportRequest) -> FineTuneJobStatus:
    """Write what the pod of an export does, and how it ended."""
    pod = _pod_of(view, export)
    if pod is None or pod.uid == export.ended_pod:
        message = _describe_wait(view, export)
        return exporting.put_export(status, revise(export, state=ExportState.WAITING, message=message))
    if has_ended(pod) or pod.reason == NODE_LOST:
        return _end(view, status, export, request, pod)
    if pod.phase is PodPhase.PENDING or pod.deleted_at is not None:
        waits = revise(export, state=ExportState.WAITING, message=_describe_pending(view, pod))
        return exporting.put_export(status, waits)
    status = exporting.put_export(status, revise(export, state=ExportState.RUNNING, message=None))
    known = {_key(each) for each in status.outputs}
    begun = (_output(request, index, OutputState.WRITING) for index in range(len(request.outputs)))
    return _put_outputs(status, [each for each in begun if _key(each) not in known])


def _pod_of(view: View, export: ExportStatus) -> ObservedPod | None:
    found = (pod for pod in view.observed.exports if pod.export is not None and pod.export.content == export.content)
    return next(found, None)


def _describe_pending(view: View, pod: ObservedPod) -> str | None:
    """Return why the container of a pod does not run yet.

    On a node without pods of the gang, the reason can be a claim: the kubelet reports it only in events.
    """
    busy = sorted({each.node for each in view.observed.pods if each.node is not None and not has_ended(each)})
    if pod.node is None or not busy or pod.node in busy or not uses_claim(view.job, view.settings):
        return pod.waiting
    hint = f"a ReadWriteOnce claim cannot be mounted on {pod.node} while pods of the job run on {', '.join(busy[:3])}"
    return f"{pod.waiting}; {hint}" if pod.waiting else hint


def _describe_wait(view: View, export: ExportStatus) -> str | None:
    """Return why the export has no pod yet, after the message of the last one."""
    refusal = view.observed.refusal
    if refusal is not None:
        return refusal.message
    due = due_at(view, export)
    if due is None or due <= view.now or export.message is None or "; the next pod starts at" in export.message:
        return export.message
    return f"{export.message}; the next pod starts at {due:%H:%M:%S} UTC"


def _end(
    view: View, status: FineTuneJobStatus, export: ExportStatus, request: ExportRequest, pod: ObservedPod
) -> FineTuneJobStatus:
    """Record the end of the pod: success, a failure that counts, a loss or an outage."""
    result = pod.export.result if pod.export is not None else None
    done = [] if result is None else _read_outputs(request, result)
    if pod.exit_code == ExitCode.DONE or (pod.exit_code is None and pod.phase is PodPhase.SUCCEEDED):
        if len([each for each in done if each.state is OutputState.WRITTEN]) == len(request.outputs):
            return exporting.put_export(
                _put_outputs(status, done), revise(export, state=ExportState.DONE, message=None)
            )
        result = ExportResult(message="the pod has ended without its result")
    message = _explain(pod, result)
    counts = _counts(pod)
    export = revise(
        export,
        state=ExportState.WAITING,
        retries=export.retries + 1,
        failures=export.failures + counts,
        ended_pod=pod.uid,
        ended_at=view.now,
        message=message,
    )
    if pod.exit_code in FINAL or export.failures > view.spec.recovery.max_failures:
        names = {each.to for each in done}
        failed = (_output(request, index, OutputState.FAILED, message) for index in range(len(request.outputs)))
        status = _put_outputs(status, [*done, *(each for each in failed if each.to not in names)])
        return exporting.put_export(status, revise(export, state=ExportState.FAILED))
    return exporting.put_export(_put_outputs(status, done), export)


def _counts(pod: ObservedPod) -> bool:
    """Return whether the end of a pod is a failure of the export itself."""
    if pod.exit_code is None:
        # Its container has not run, or its node is lost.
        return pod.init_failure is not None
    if pod.deleted_at is not None or pod.disruption is not None:
        return False
    return pod.exit_code not in OUTAGES and (pod.exit_code < FIRST_SIGNAL_EXIT or _is_out_of_memory(pod))


def _is_out_of_memory(pod: ObservedPod) -> bool:
    return pod.reason == "OOMKilled" or pod.killed


def _explain(pod: ObservedPod, result: ExportResult | None) -> str:
    if pod.disruption is not None or pod.deleted_at is not None or pod.reason == NODE_LOST:
        return f"the pod {pod.name} was lost: {pod.message or pod.reason or 'it was deleted'}"
    if _is_out_of_memory(pod):
        return f"the pod {pod.name} had not enough memory; raise spec.topology.resources.memory"
    if result is not None and result.message:
        return result.message
    if pod.init_failure is not None:
        return pod.init_failure
    if pod.exit_code is None:
        return f"the pod {pod.name} did not start: {pod.message or pod.reason or 'unknown reason'}"
    return f"the pod {pod.name} ended: {describe(pod.exit_code)}"


# -- the outputs in the status ----------------------------------------------------------------------------------------


def _output(request: ExportRequest, index: int, state: OutputState, message: str | None = None) -> OutputStatus:
    asked = request.outputs[index]
    return OutputStatus(
        format=asked.format.value, to=asked.to, state=state, bytes=0, message=message, step=request.step
    )


def _read_outputs(request: ExportRequest, result: ExportResult) -> list[OutputStatus]:
    """Return the outputs that a result names."""
    found = []
    for each in result.outputs:
        if each.index >= len(request.outputs):
            continue
        if each.error is not None:
            found.append(_output(request, each.index, OutputState.FAILED, each.error))
        else:
            written = _output(request, each.index, OutputState.WRITTEN)
            found.append(revise(written, bytes=each.size_bytes, sha256=each.sha256))
    return found


def _key(output: OutputStatus) -> tuple[str, str, int | None]:
    return output.format, output.to, output.step


def _put_outputs(status: FineTuneJobStatus, found: Iterable[OutputStatus]) -> FineTuneJobStatus:
    """Write outputs, each in the place of its earlier entry."""
    outputs = {_key(each): each for each in status.outputs} | {_key(each): each for each in found}
    return revise(status, outputs=tuple(outputs.values())[-MAX_OUTPUTS:])


# -- actions ----------------------------------------------------------------------------------------------------------


def due_at(view: View, export: ExportStatus) -> datetime | None:
    """Return when the next pod of an export may start; None: at once."""
    if export.ended_at is None:
        return None
    factor = backoff.jitter(view.job.metadata.uid, export.retries)
    return export.ended_at + backoff.delay(export.retries, view.settings) * factor


def _is_paused(view: View, export: ExportStatus) -> bool:
    """Return whether the job is suspended. A request of a user is carried out all the same."""
    return view.spec.suspend and export.request == exporting.OWN


def act(view: View, status: FineTuneJobStatus) -> tuple[Action, ...]:
    """Delete pods that are not needed, and create the one that is missing."""
    export = exporting.active_export(status)
    if export is None or _is_paused(view, export):
        # A pod that has ended stays for its log.
        return tuple(_delete(pod) for pod in view.observed.exports if pod.phase not in ENDED and pod.deleted_at is None)
    due = due_at(view, export)
    if due is not None and view.now < due:
        return ()
    obsolete = [pod for pod in view.observed.exports if _is_obsolete(view, export, pod)]
    if obsolete or view.observed.exports:
        return tuple(_delete(pod) for pod in obsolete if pod.deleted_at is None)
    request = _request_of(view, export)
    if request is None or _is_held(view):
        return ()
    config = () if config_name(view.job.metadata.name) in view.observed.configs else (Create(build_config(view.job)),)
    return (*config, Create(build_export_pod(view.job, request, view.settings)))


def _is_obsolete(view: View, export: ExportStatus, pod: ObservedPod) -> bool:
    """Return whether a pod must leave: of another export, ended, or waiting with an earlier podTemplate."""
    if pod.uid == export.ended_pod or pod.export is None or pod.export.content != export.content:
        return True
    return pod.phase is PodPhase.PENDING and view.is_outdated(pod)


def _is_held(view: View) -> bool:
    create_after = view.observed.create_after
    return view.creation_on_hold or (create_after is not None and view.now < create_after)


def _delete(pod: ObservedPod) -> DeletePod:
    return DeletePod(pod.name, pod.uid)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the next pod may start: after a back-off, or after the cluster has refused one."""
    export = exporting.active_export(status)
    if export is None or _is_paused(view, export):
        return None
    due = due_at(view, export)
    if due is not None and due > view.now:
        return due
    if view.observed.exports or not _is_held(view):
        return None
    refusal = view.observed.refusal
    return view.observed.create_after or (refusal.hold_until if refusal is not None else None)


def describe_own(view: View, status: FineTuneJobStatus) -> str:
    """Return what the export of a job's own outputs does, for the message of the job."""
    own, pod = exporting.find_export(status, own=True), export_pod_name(view.job.metadata.name)
    if own is None:
        return "all steps are trained; waiting for the end of a requested export"
    if own.state is ExportState.RUNNING:
        return f"the pod {pod} writes outputs"
    return f"{pod}: {own.message}" if own.message else f"the pod {pod} is being started"


POLICY = Policy("exports", decide=decide, wake=wake, act=act)
