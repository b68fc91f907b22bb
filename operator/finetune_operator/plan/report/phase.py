"""The job's phase, reason and message: one line that shows a user what the job does and what it waits for.

Derived in every reconcile from the ledger, the pods and the reports of the ranks. Times in a message are absolute, so
that it changes only when something happens.
"""

from __future__ import annotations

from datetime import datetime

from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import REGROUPS, Reason
from finetune_operator.api.status import AttemptStatus, Condition, FineTuneJobStatus
from finetune_operator.manifests import num_nodes
from finetune_operator.plan.model import admission, exporting, gangs
from finetune_operator.plan.model.activity import BEFORE_TRAINING, describe_activity, stage
from finetune_operator.plan.model.causes import find_cause
from finetune_operator.plan.model.conditions import find
from finetune_operator.plan.model.explain import explain_end
from finetune_operator.plan.model.ledger import RELEASED, current, open_entry
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.silence import describe_silence, silent_at
from finetune_operator.plan.model.types import IMAGE_ERRORS, PodPhase
from finetune_operator.plan.model.view import View, is_finished, members_of
from finetune_operator.plan.policies import attempts, exports, suspend
from finetune_operator.plan.policies.capacity import elastic, incomplete, quota, spot

CONFIG_ERRORS = (
    *("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError", "FailedMount"),
    *("CrashLoopBackOff", "PostStartHookError", "CreatePodSandboxError", "ContainerCannotRun"),
)
"""Prefixes of a container's waiting reason if the container cannot be created or started."""
UNSCHEDULABLE = "Unschedulable"
GATED = "SchedulingGated"
FOR_CAPACITY = frozenset({Reason.UNSCHEDULABLE, Reason.QUEUED})
"""Waits that only the cluster can end, with a free node or the admission by a queue."""

Line = tuple[Phase, str, str]
"""Phase, reason and message."""


def describe(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write phase, reason and message. Those of a finished job do not change."""
    if is_finished(status):
        return revise(status, nodes=nodes(view, status))
    phase, reason, message = _line(view, status)
    status = revise(status, phase=phase, reason=str(reason), message=message, nodes=nodes(view, status))
    return _clear_old_figures(status, trains=phase is Phase.RUNNING and not view.spec.suspend)


def _clear_old_figures(status: FineTuneJobStatus, *, trains: bool) -> FineTuneJobStatus:
    """Clear speed and ETA while the job does not train. A job that writes its outputs keeps its last speed."""
    speed = status.images_per_second if trains or status.phase is Phase.EXPORTING else None
    return revise(status, images_per_second=speed, eta=status.eta if trains else None)


def nodes(view: View, status: FineTuneJobStatus) -> str | None:
    """Return the running pods of the newest attempt over the requested ones, e.g. '3/4'; None before the first."""
    if status.attempt == 0:
        return None
    # Also of an attempt that begins now: it may keep pods of the previous one.
    members = set(members_of(status, view.spec))
    pods = (pod for pod in view.observed.pods if (pod.attempt, pod.node_rank) in members)
    num_up = sum(pod.phase is PodPhase.RUNNING and pod.deleted_at is None for pod in pods)
    return f"{num_up}/{num_nodes(view.spec)}"


def _line(view: View, status: FineTuneJobStatus) -> Line:
    entry = current(status)
    if suspend.is_suspended(view):
        return Phase.SUSPENDED, Reason.SUSPENDED, _suspended(status)
    if view.spec.suspend:
        return status.phase or Phase.RUNNING, Reason.SUSPENDING, "the ranks are saving their state before they stop"
    if entry is None or entry.ended_at is not None:
        refused = _not_accepted(status)
        if refused is not None:
            return Phase.PENDING, refused.reason, refused.message
    return _of_attempt(view, status, entry)


def _of_attempt(view: View, status: FineTuneJobStatus, entry: AttemptStatus | None) -> Line:
    """Return the line of an accepted job: it waits for its queue, or its newest attempt works or has ended."""
    if exporting.has_trained(view, status):
        return _exports(view, status)
    if _is_queued(view, entry):
        return Phase.QUEUED, Reason.QUEUED, admission.describe_wait(view)
    if entry is None:
        return Phase.PENDING, Reason.WAITING_FOR_PODS, "waiting for the first attempt"
    if entry.ended_at is not None:
        return _ended(view, status, entry)
    return _open(view, status, entry)


def _exports(view: View, status: FineTuneJobStatus) -> Line:
    """Return the line of a job that has trained, and whose export pod writes outputs."""
    own = exporting.find_export(status, own=True)
    reason = _waiting_reason(own.message) if own is not None and own.message else Reason.EXPORTING
    reason = Reason.EXPORTING if reason is Reason.WAITING_FOR_PODS else reason
    return Phase.EXPORTING, reason, exports.describe_own(view, status)


def _is_queued(view: View, entry: AttemptStatus | None) -> bool:
    """Return whether the job has no pods and waits for its queue."""
    between = entry is None or entry.reason is not None
    waits = not admission.may_create(view) or admission.must_ask_again(view)
    return between and waits and not view.observed.pods


def _suspended(status: FineTuneJobStatus) -> str:
    at = f" at step {status.last_checkpoint.step}" if status.last_checkpoint else ""
    return f"suspended{at}; set spec.suspend to false to resume"


def _ended(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> Line:
    """Return the line between two attempts: why the last one ended, and what the next one waits for."""
    if entry.reason is None:
        guess = find_cause(view, entry.gang_complete)
        reason = guess.reason if guess is not None else Reason.POD_LOST
        return Phase.RECOVERING, reason, f"attempt {entry.attempt} ended; determining the cause"
    # After an end that is no interruption, such as a suspension, there is nothing to recover from.
    phase = Phase.RECOVERING if _interrupts(status, entry) else Phase.STARTING
    if entry.reason in RELEASED and phase is Phase.STARTING:
        phase = Phase.QUEUED
    why = explain_end(entry)
    if view.observed.pods:
        return phase, entry.reason, f"{why} Its pods are being deleted or kept for the next attempt."
    due = attempts.wake(view, status)
    if due is not None and due > view.now:
        reason = Reason(entry.reason) if entry.reason in RELEASED else Reason.BACK_OFF
        return phase, reason, f"{why} The next attempt begins at {due:%H:%M:%S} UTC."
    return phase, entry.reason, why


def _open(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> Line:
    """Return the line of an open attempt: its pods start, then its ranks work."""
    waiting_phase = Phase.RECOVERING if _is_recovery(status) else Phase.STARTING
    if entry.attempt != view.attempt:
        return waiting_phase, Reason.WAITING_FOR_PODS, f"{nodes(view, status)} pods are running"
    if not view.all_up():
        phase, reason, message = _waiting(view, status, waiting_phase)
        return phase, reason, message + _end_of_wait(view, entry)
    if not view.reports:
        return _without_heartbeats(view, status, entry, waiting_phase)
    return _working_phase(view, entry, waiting_phase), *describe_activity(view, status)


def _working_phase(view: View, entry: AttemptStatus, waiting_phase: Phase) -> Phase:
    """Return the phase of a gang whose pods all run."""
    reached = stage(view)
    if reached is Reason.EXPORTING:
        return Phase.EXPORTING
    # An attempt has recovered only once its first step is done.
    trains = reached not in BEFORE_TRAINING and entry.training_at is not None
    return Phase.RUNNING if trains else waiting_phase


def _is_recovery(status: FineTuneJobStatus) -> bool:
    """Return whether a preemption or a failure ended the attempt before this one."""
    return len(status.attempts) > 1 and _interrupts(status, status.attempts[-2])


def _interrupts(status: FineTuneJobStatus, entry: AttemptStatus) -> bool:
    """Return whether the end of an attempt interrupted the training."""
    if entry.reason in REGROUPS or entry.reason in RELEASED:
        return any(old.training_at is not None for old in status.attempts)
    return entry.counts_as is not None


def _waiting(view: View, status: FineTuneJobStatus, phase: Phase) -> Line:
    """Return why not all pods run: the message of the API server, the scheduler or the kubelet, if there is one."""
    if refused := _refused(view, status):
        starting = Phase.PENDING if _not_accepted(status) else Phase.QUEUED
        return starting if phase is Phase.STARTING else phase, Reason.FAILED_CREATE, refused
    for pod in view.pods.values():
        if pod.waiting:
            reason = _waiting_reason(pod.waiting)
            queued = phase is Phase.STARTING and reason in FOR_CAPACITY
            return Phase.QUEUED if queued else phase, reason, f"{pod.name}: {pod.waiting}"
    return phase, Reason.WAITING_FOR_PODS, f"{nodes(view, status)} pods are running"


def _not_accepted(status: FineTuneJobStatus) -> Condition | None:
    """Return the condition that explains what is wrong with the spec; None if the spec is accepted."""
    accepted = find(status, ConditionType.ACCEPTED)
    return accepted if accepted is not None and accepted.status != "True" else None


def _refused(view: View, status: FineTuneJobStatus) -> str | None:
    """Return why the API server refuses pods of the job; None if it does not."""
    refusal = _not_accepted(status)
    if refusal is not None and refusal.reason == Reason.FAILED_CREATE:
        return refusal.message
    return view.observed.refusal.message if view.observed.refusal is not None else None


def _end_of_wait(view: View, entry: AttemptStatus) -> str:
    """Return when the job stops waiting for nodes, and what it does then; empty if it waits without a limit."""
    least = view.spec.topology.min_nodes or view.num_nodes
    shrink_at, fallback_at = elastic.shrink_at(view, entry), spot.fallback_at(view, entry)
    text = ""
    return_at = incomplete.release_at(view, entry)
    if return_at is not None and return_at > view.now:
        text += f"; {incomplete.describe(view)}, and they are released at {return_at:%H:%M:%S} UTC"
    release_at = quota.release_at(view, entry)
    if release_at is not None and release_at > view.now:
        text += f"; {quota.describe_admission(view)}, and their quota is released at {release_at:%H:%M:%S} UTC"
    if shrink_at is not None and shrink_at > view.now and len(gangs.placed(view)) >= least:
        text += f"; continues on fewer nodes at {shrink_at:%H:%M:%S} UTC"
    if fallback_at is not None and fallback_at > view.now:
        text += f"; accepts any node at {fallback_at:%H:%M:%S} UTC"
    return text


def _waiting_reason(message: str) -> Reason:
    if message.startswith(IMAGE_ERRORS):
        return Reason.IMAGE_PULL
    if message.startswith(CONFIG_ERRORS):
        return Reason.CONTAINER_CONFIG
    if message.startswith(GATED):
        return Reason.QUEUED
    return Reason.UNSCHEDULABLE if message.startswith(UNSCHEDULABLE) else Reason.WAITING_FOR_PODS


def _without_heartbeats(view: View, status: FineTuneJobStatus, entry: AttemptStatus, waiting_phase: Phase) -> Line:
    """Return the line of running pods without heartbeats: just started, operator restarted, or no coordinator."""
    trained = entry.training_at is not None and status.phase in (Phase.RUNNING, Phase.EXPORTING)
    phase = status.phase if trained and status.phase is not None else waiting_phase
    if silence := describe_silence(view, status):
        return phase, Reason.SILENT, silence
    if trained:
        return phase, status.reason or Reason.TRAINING, status.message or ""
    if not view.settings.coordinator_url:
        return Phase.RUNNING, Reason.TRAINING, "all pods are running; their progress is unknown without a coordinator"
    return waiting_phase, Reason.LOADING, "all pods are running; waiting for the first heartbeat"


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when to report a pod as silent."""
    if is_finished(status) or open_entry(status) is None:
        return None
    return silent_at(view, status)


POLICY = Policy("phase", decide=describe, wake=wake)
