"""recovery.maxMemory: more memory for the pods after the kernel has ended one that exceeded its memory.

The pods that are created later get it. The other pods of the gang, which an in-place recovery keeps, get it while they
run if the administrator allows it: their ranks hold as much as the lost one. Each raise is limited by
`recovery.maxMemory`, so an end after which the memory is raised does not spend the failure budget.
"""

from __future__ import annotations

from decimal import Decimal

from finetune_contract.exit_codes import OOM_KILL
from finetune_operator.api.quantity import parse_quantity
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.manifests.resources import MEBIBYTE, MEMORY, grown_topology
from finetune_operator.plan.model.ledger import current, replace_current
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.types import ObservedPod, PodPhase, ResizePod
from finetune_operator.plan.model.view import View, has_ended, is_finished
from finetune_operator.plan.policies import in_place

GROWTH = Decimal("1.5")


def raise_memory(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Raise the memory of the next pods in the reconcile that finds the end of an attempt."""
    entry = current(status)
    if entry is None or not _is_news(view, entry) or not _is_kill(view, entry):
        return status
    raised = next_memory(view)
    if raised is None or _had_other(view, entry):
        return status
    tally = revise(
        status.tally,
        failures_since_checkpoint=max(0, status.tally.failures_since_checkpoint - 1),
        failed_step=None,
        failures_at_step=0,
    )
    status = replace_current(status, revise(entry, memory=_memory(view)))
    return revise(status, memory=raised, tally=tally)


def next_memory(view: View) -> str | None:
    """Return the memory after the next raise; None: it may not grow, or has its maximum."""
    now, most = _memory(view), view.spec.recovery.max_memory
    if now is None or most is None or parse_quantity(now) >= parse_quantity(most):
        return None
    mebibytes = int((parse_quantity(now) * GROWTH / MEBIBYTE).to_integral_value())
    grown = f"{mebibytes}Mi"
    return min(grown, most, key=parse_quantity)


def resize_kept(view: View, status: FineTuneJobStatus) -> tuple[ResizePod, ...]:
    """Return the changes of running pods that have less memory than a new pod would get.

    The reconcile that raises the memory changes none: only with the stored status is it known which pods are kept.
    """
    memory = _memory(view)
    if not view.settings.resize_pods or view.job.status.memory is None or memory is None or is_finished(status):
        return ()
    amount = parse_quantity(memory)
    small = (pod for pod in _lasting(view, status) if pod.memory is not None and parse_quantity(pod.memory) < amount)
    return tuple(ResizePod(pod.name, pod.uid, memory) for pod in small)


def _lasting(view: View, status: FineTuneJobStatus) -> list[ObservedPod]:
    """Return the running pods that stay: those of the open attempt, or those that the next one keeps."""
    entry = current(status)
    if entry is None or entry.attempt != view.attempt:
        return []
    pods = in_place.survivors(view, status) if entry.reason is not None else view.pods.values()
    return [pod for pod in pods if pod.phase is PodPhase.RUNNING and pod.deleted_at is None and not has_ended(pod)]


def _memory(view: View) -> str | None:
    """Return the memory of a new pod; None: the spec sets none."""
    memory = (grown_topology(view.job).resources or {}).get(MEMORY)
    return str(memory) if memory is not None else None


def _is_news(view: View, entry: AttemptStatus) -> bool:
    """Return whether this reconcile found that the attempt ended for lack of memory."""
    before = current(view.job.status)
    known = before is not None and before.attempt == entry.attempt and before.reason == Reason.OUT_OF_MEMORY
    return entry.attempt == view.attempt and entry.reason == Reason.OUT_OF_MEMORY and not known


def _is_kill(view: View, entry: AttemptStatus) -> bool:
    """Return whether the kernel ended a process of the pod: more memory of a pod is of no help to a GPU."""
    pod = _find(view, entry)
    killed = pod is not None and (pod.reason == "OOMKilled" or pod.killed)
    return killed or OOM_KILL in (entry.message or "")


def _had_other(view: View, entry: AttemptStatus) -> bool:
    """Return whether the pod had other memory than a new one: that already has more, or podTemplate sets it."""
    pod, now = _find(view, entry), _memory(view)
    if pod is None or pod.memory is None or now is None:
        return False
    return parse_quantity(pod.memory) != parse_quantity(now)


def _find(view: View, entry: AttemptStatus) -> ObservedPod | None:
    return next((pod for pod in view.pods.values() if pod.name == entry.pod), None)


POLICY = Policy("memory", decide=raise_memory, act=resize_kept)
