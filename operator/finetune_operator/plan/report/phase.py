"""The job's phase, reason and message: one line that tells a person where the job is and what it waits for.

Derived anew in every pass from the ledger, the pods and what the ranks report. Times in a message are absolute, so
that it changes only when something happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from finetune_contract.heartbeat import RankState
from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import AttemptStatus, Condition, FineTuneJobStatus
from finetune_operator.api.reasons import REGROUPS, Reason
from finetune_operator.manifests import num_nodes
from finetune_operator.plan.model.causes import find_cause
from finetune_operator.plan.model.ledger import current, open_entry
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.types import IMAGE_ERRORS, PodPhase
from finetune_operator.plan.model.view import View, earliest, is_finished
from finetune_operator.plan.policies import attempts, capacity, elastic, suspend
from finetune_operator.plan.report.conditions import find
from finetune_operator.plan.report.explain import explain_end

STATES = {
    RankState.STARTING: Reason.LOADING,
    RankState.LOADING: Reason.LOADING,
    RankState.CACHING: Reason.CACHING,
    RankState.RESTORING: Reason.RESTORING,
    RankState.TRAINING: Reason.TRAINING,
    RankState.VALIDATING: Reason.VALIDATING,
    RankState.SAVING: Reason.SAVING,
    RankState.SAVED: Reason.SAVING,
    RankState.EXPORTING: Reason.EXPORTING,
    RankState.DONE: Reason.EXPORTING,
    RankState.FAILED: Reason.TRAINING,
}
"""What each state of a rank is called."""
STAGES = (
    Reason.LOADING,
    Reason.CACHING,
    Reason.RESTORING,
    Reason.TRAINING,
    Reason.VALIDATING,
    Reason.SAVING,
    Reason.EXPORTING,
)
"""The work of a rank in the order in which it first comes to it."""
DOING = {
    Reason.LOADING: "loading the model and the data set",
    Reason.CACHING: "caching latents and text embeddings",
    Reason.RESTORING: "restoring the newest checkpoint",
    Reason.TRAINING: "training",
    Reason.VALIDATING: "validating",
    Reason.SAVING: "saving a checkpoint",
    Reason.EXPORTING: "writing the outputs",
}
"""What a person is told of each; `kubectl get` shows no reason."""
BEFORE_TRAINING = frozenset({Reason.LOADING, Reason.CACHING, Reason.RESTORING})
BESIDE_TRAINING = frozenset({Reason.VALIDATING, Reason.SAVING})
CONFIG_ERRORS = ("CreateContainerConfigError", "CreateContainerError", "FailedMount")
UNSCHEDULABLE = "Unschedulable"
GATED = "SchedulingGated"
FOR_ROOM = frozenset({Reason.UNSCHEDULABLE, Reason.QUEUED})
"""Waits that only the cluster can end, with room or a queue's leave."""

Line = tuple[Phase, str, str]


def describe(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write phase, reason and message. Those of a finished job stay."""
    if is_finished(status):
        return revise(status, nodes=nodes(view, status))
    phase, reason, message = _line(view, status)
    status = revise(status, phase=phase, reason=str(reason), message=message, nodes=nodes(view, status))
    return _without_old_figures(status, trains=phase is Phase.RUNNING and not view.spec.suspend)


def _without_old_figures(status: FineTuneJobStatus, *, trains: bool) -> FineTuneJobStatus:
    """Speed and time left are those of now. The last speed stays for a job that is at its end."""
    speed = status.images_per_second if trains or status.phase is Phase.EXPORTING else None
    return revise(status, images_per_second=speed, eta=status.eta if trains else None)


def nodes(view: View, status: FineTuneJobStatus) -> str | None:
    """Pods of the newest attempt that are up, over pods asked for, e.g. '3/4'; None before the first attempt."""
    if status.attempt == 0:
        return None
    pods = view.pods.values() if status.attempt == view.attempt else ()
    up = [pod for pod in pods if pod.phase is PodPhase.RUNNING and pod.deleted_at is None]
    return f"{len(up)}/{num_nodes(view.spec)}"


def _line(view: View, status: FineTuneJobStatus) -> Line:
    entry = current(status)
    if suspend.is_suspended(view):
        return Phase.SUSPENDED, Reason.SUSPENDED, _suspended(status)
    if view.spec.suspend:
        return status.phase or Phase.RUNNING, Reason.SUSPENDING, "the ranks save their state and stop"
    if entry is None or entry.ended_at is not None:
        refused = _not_accepted(status)
        if refused is not None:
            return Phase.PENDING, refused.reason, refused.message
    if entry is None:
        return Phase.PENDING, Reason.WAITING_FOR_PODS, "waiting for the first attempt"
    if entry.ended_at is not None:
        return _ended(view, status, entry)
    return _working(view, status, entry)


def _suspended(status: FineTuneJobStatus) -> str:
    at = f" at step {status.last_checkpoint.step}" if status.last_checkpoint else ""
    return f"suspended{at}; set spec.suspend to false to go on"


def _ended(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> Line:
    """Between two attempts: why the last one ended, and what the next one waits for."""
    if entry.reason is None:
        guess = find_cause(view, entry.gang_complete)
        reason = guess.reason if guess is not None else Reason.POD_LOST
        return Phase.RECOVERING, reason, f"attempt {entry.attempt} ended; looking for the cause"
    # After an end that counts as nothing, such as a suspension that was taken back, there is nothing to recover from.
    phase = Phase.RECOVERING if _interrupts(status, entry) else Phase.STARTING
    why = explain_end(entry)
    if view.observed.pods:
        return phase, entry.reason, f"{why} Its pods are being cleared."
    due = attempts.wake(view, status)
    if due is not None and due > view.now:
        return phase, Reason.BACK_OFF, f"{why} The next attempt begins at {due:%H:%M:%S} UTC."
    return phase, entry.reason, why


def _working(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> Line:
    """An attempt is open: its pods come up, then its ranks get to work."""
    waiting_phase = Phase.RECOVERING if _is_recovery(status) else Phase.STARTING
    if entry.attempt != view.attempt:
        return waiting_phase, Reason.WAITING_FOR_PODS, f"{nodes(view, status)} pods are up"
    if not view.all_up():
        phase, reason, message = _waiting(view, status, waiting_phase)
        return phase, reason, message + _patience(view, entry)
    if not view.reports:
        return _unheard(view, status, entry, waiting_phase)
    phase, reason, message = _at_work(view, status, entry, waiting_phase)
    if silent := _silent(view):
        return phase, Reason.SILENT, silent
    return phase, reason, message


def _at_work(view: View, status: FineTuneJobStatus, entry: AttemptStatus, waiting_phase: Phase) -> Line:
    """All pods run and speak: what their ranks are doing."""
    reason = _stage(STATES[report.state] for report in view.reports)
    detail = _detail(view, status, reason)
    if reason in BEFORE_TRAINING:
        return waiting_phase, reason, detail
    if reason is Reason.EXPORTING:
        return Phase.EXPORTING, reason, detail
    # Its first step is not done yet: an attempt has recovered only once it is.
    trained = entry.training_at is not None
    return (Phase.RUNNING if trained else waiting_phase), reason, detail


def _stage(reasons: Iterable[Reason]) -> Reason:
    """Until all ranks train, the gang is where its last one is; from then on, what any of them does beside training."""
    by_order = sorted(reasons, key=STAGES.index)
    return by_order[0] if by_order[0] in BEFORE_TRAINING else by_order[-1]


def _is_recovery(status: FineTuneJobStatus) -> bool:
    """Whether capacity or a failure ended the attempt before this one."""
    return len(status.attempts) > 1 and _interrupts(status, status.attempts[-2])


def _interrupts(status: FineTuneJobStatus, entry: AttemptStatus) -> bool:
    """Whether there is something to recover from after an attempt: it, or one that it was to follow, has trained."""
    if entry.reason in REGROUPS:
        return any(old.training_at is not None for old in status.attempts)
    return entry.counts_as is not None


def _waiting(view: View, status: FineTuneJobStatus, phase: Phase) -> Line:
    """Not all pods run: the words of the API server, the scheduler or the kubelet, where there are any."""
    if refused := _refused(view, status):
        starting = Phase.PENDING if _not_accepted(status) else Phase.QUEUED
        return starting if phase is Phase.STARTING else phase, Reason.FAILED_CREATE, refused
    for pod in view.pods.values():
        if pod.waiting:
            reason = _waiting_reason(pod.waiting)
            queued = phase is Phase.STARTING and reason in FOR_ROOM
            return Phase.QUEUED if queued else phase, reason, f"{pod.name}: {pod.waiting}"
    return phase, Reason.WAITING_FOR_PODS, f"{nodes(view, status)} pods are up"


def _not_accepted(status: FineTuneJobStatus) -> Condition | None:
    """The condition that says what is wrong with the spec; None where it is accepted."""
    accepted = find(status, ConditionType.ACCEPTED)
    return accepted if accepted is not None and accepted.status != "True" else None


def _refused(view: View, status: FineTuneJobStatus) -> str | None:
    """Why the cluster takes no more pods of the job."""
    refusal = _not_accepted(status)
    if refusal is not None and refusal.reason == Reason.FAILED_CREATE:
        return refusal.message
    return view.observed.refusal.sentence if view.observed.refusal is not None else None


def _patience(view: View, entry: AttemptStatus) -> str:
    """Until when room is waited for, where something else is done then."""
    least = view.spec.topology.min_nodes or view.num_nodes
    shrink_at, fallback_at = elastic.shrink_at(view, entry), capacity.fallback_at(view, entry)
    words = ""
    if shrink_at is not None and shrink_at > view.now and len(elastic.placed(view)) >= least:
        words += f"; it goes on without them at {shrink_at:%H:%M:%S} UTC"
    if fallback_at is not None and fallback_at > view.now:
        words += f"; it takes any node at {fallback_at:%H:%M:%S} UTC"
    return words


def _waiting_reason(words: str) -> Reason:
    if words.startswith(IMAGE_ERRORS):
        return Reason.IMAGE_PULL
    if words.startswith(CONFIG_ERRORS):
        return Reason.CONTAINER_CONFIG
    if words.startswith(GATED):
        return Reason.QUEUED
    return Reason.UNSCHEDULABLE if words.startswith(UNSCHEDULABLE) else Reason.WAITING_FOR_PODS


def _unheard(view: View, status: FineTuneJobStatus, entry: AttemptStatus, waiting_phase: Phase) -> Line:
    """All pods run and none has beaten: just started, or the operator was restarted, or there is no coordinator."""
    if entry.training_at is not None and status.phase in (Phase.RUNNING, Phase.EXPORTING):
        return status.phase, status.reason or Reason.TRAINING, status.message or ""
    if not view.settings.coordinator_url:
        return Phase.RUNNING, Reason.TRAINING, "all pods run; there is no coordinator to hear of their progress"
    return waiting_phase, Reason.LOADING, "all pods run; their supervisors have not been heard yet"


def _detail(view: View, status: FineTuneJobStatus, reason: Reason) -> str:
    """What the gang is doing, in words, and how far it is with that."""
    details = (report.detail for report in view.reports if report.detail and STATES[report.state] is reason)
    detail = next(details, None)
    if status.step is not None and (reason is Reason.TRAINING or (detail is None and reason in BESIDE_TRAINING)):
        detail = f"step {status.step}" + (f" of {status.total_steps}" if status.total_steps else "")
    return f"{DOING[reason]}: {detail}" if detail else DOING[reason]


def _silent(view: View) -> str | None:
    """Say which pod has not been heard for too long, and since when."""
    timeout = timedelta(seconds=view.settings.beat_timeout_seconds)
    for received in view.beats.values():
        if received.received_at + timeout <= view.now:
            return f"{received.beat.pod} has not been heard since {received.received_at:%H:%M:%S} UTC"
    return None


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When a pod that stays silent must be called so."""
    if is_finished(status) or open_entry(status) is None:
        return None
    timeout = timedelta(seconds=view.settings.beat_timeout_seconds)
    late = (received.received_at + timeout for received in view.beats.values())
    return earliest(time for time in late if time > view.now)
