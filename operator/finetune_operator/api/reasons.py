"""Reasons in the status, the conditions, the ledger and events, each with its meaning and its remedy.

docs/reference/reasons.md is generated from REASONS.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CountsAs(StrEnum):
    """Budget that the end of an attempt is charged to; some ends are charged to neither."""

    PREEMPTION = "Preemption"
    """A loss of capacity: does not count towards recovery.maxFailures."""
    FAILURE = "Failure"
    """An error of the program: counts towards recovery.maxFailures."""
    OUTAGE = "Outage"
    """A service that the program needs does not work: does not count towards recovery.maxFailures, but delays the next
    attempt."""


class Reason(StrEnum):
    """Reasons of a job's phase and of the end of an attempt: in status.reason, conditions, the ledger and events."""

    ACCEPTED = "Accepted"
    INVALID_SPEC = "InvalidSpec"
    NOT_SUPPORTED = "NotSupported"

    QUEUED = "Queued"
    WAITING_FOR_PODS = "WaitingForPods"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL = "ImagePull"
    CONTAINER_CONFIG = "ContainerConfig"
    FAILED_CREATE = "FailedCreate"
    QUOTA_RELEASED = "QuotaReleased"
    GANG_RELEASED = "GangReleased"
    BACK_OFF = "BackOff"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"

    LOADING = "Loading"
    CACHING = "Caching"
    RESTORING = "Restoring"
    TRAINING = "Training"
    SAVING = "Saving"
    VALIDATING = "Validating"
    EXPORTING = "Exporting"
    SILENT = "Silent"
    SPEC_APPLIED = "SpecApplied"
    SAVE_TAKES_LONGER = "SaveTakesLonger"
    SAVE_IN_TIME = "SaveInTime"
    SLOWER_THAN_PEERS = "SlowerThanPeers"
    AS_FAST_AS_PEERS = "AsFastAsPeers"

    NOTICE_SAVED = "NoticeSaved"
    PREEMPTED = "Preempted"
    PREEMPTION_BY_SCHEDULER = "PreemptionByScheduler"
    EVICTION_BY_EVICTION_API = "EvictionByEvictionAPI"
    DELETION_BY_TAINT_MANAGER = "DeletionByTaintManager"
    EVICTED_BY_QUEUE = "EvictedByQueue"
    DELETION_BY_POD_GC = "DeletionByPodGC"
    TERMINATION_BY_KUBELET = "TerminationByKubelet"
    POD_DELETED = "PodDeleted"
    POD_LOST = "PodLost"
    NODE_LOST = "NodeLost"
    REFUSED_BY_KUBELET = "RefusedByKubelet"
    GPU_FAULT = "GpuFault"

    NETWORK_ERROR = "NetworkError"
    STORAGE_UNAVAILABLE = "StorageUnavailable"

    PROCESS_FAILED = "ProcessFailed"
    OUT_OF_MEMORY = "OutOfMemory"
    EVICTED = "Evicted"
    INIT_CONTAINER_FAILED = "InitContainerFailed"
    FABRIC_ERROR = "FabricError"
    STORAGE_ERROR = "StorageError"
    CHECKPOINT_STALE = "CheckpointStale"
    CHECKPOINT_WRITTEN = "CheckpointWritten"
    DATA_ERROR = "DataError"
    CONFIGURATION_ERROR = "ConfigurationError"
    HANG = "Hang"
    SUPERSEDED = "Superseded"

    SHRUNK = "Shrunk"
    GROWN = "Grown"
    FELL_BACK = "FellBack"
    BACK_TO_SPOT = "BackToSpot"
    PODS_LATE = "PodsLate"
    SPEC_EDITED = "SpecEdited"
    TARGET_EDITED = "TargetEdited"

    FINISHED = "Finished"
    MAX_FAILURES_EXCEEDED = "MaxFailuresExceeded"
    SAME_STEP_FAILURES = "SameStepFailures"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    EXPORT_FAILED = "ExportFailed"

    ATTEMPT_STARTED = "AttemptStarted"
    ATTEMPT_ENDED = "AttemptEnded"
    RECOVERED = "Recovered"
    CHECKPOINT_COMMITTED = "CheckpointCommitted"
    TRAINER_WARNING = "TrainerWarning"
    OUTPUT_WRITTEN = "OutputWritten"
    OUTPUT_FAILED = "OutputFailed"
    MEMORY_RAISED = "MemoryRaised"
    NAME_TAKEN = "NameTaken"


class Topic(StrEnum):
    """Sections of the documentation of reasons."""

    SPEC = "Is the spec accepted?"
    WAITING = "What does the job wait for?"
    WORKING = "What is the job doing?"
    CAPACITY = "Why was an attempt preempted?"
    OUTAGE = "Which outage ended an attempt?"
    FAILURE = "Why did an attempt fail?"
    REGROUP = "Why did the gang change?"
    END = "How did the job end?"
    EVENT = "Events only"


@dataclass(frozen=True)
class ReasonDoc:
    """Meaning of a reason and what a user should do about it."""

    topic: Topic
    meaning: str
    remedy: str
    counts_as: CountsAs | None = None
    """How an attempt that ended for this reason counts: as preemption, as failure, or as neither (None)."""
    final: bool = False
    """Whether another attempt would fail, too: the job fails immediately."""


NOTHING = "Nothing."
_RESUMES = "Nothing: the next attempt continues from the last checkpoint."


def _capacity(meaning: str, remedy: str = _RESUMES) -> ReasonDoc:
    return ReasonDoc(Topic.CAPACITY, meaning, remedy, CountsAs.PREEMPTION)


def _failure(meaning: str, remedy: str, *, final: bool = False) -> ReasonDoc:
    return ReasonDoc(Topic.FAILURE, meaning, remedy, CountsAs.FAILURE, final)


def _outage(meaning: str, remedy: str) -> ReasonDoc:
    return ReasonDoc(Topic.OUTAGE, meaning, remedy, CountsAs.OUTAGE)


def _regroup(meaning: str, remedy: str = NOTHING) -> ReasonDoc:
    return ReasonDoc(Topic.REGROUP, meaning, remedy)


REASONS: dict[Reason, ReasonDoc] = {
    Reason.ACCEPTED: ReasonDoc(Topic.SPEC, "The spec can be run.", NOTHING),
    Reason.INVALID_SPEC: ReasonDoc(
        Topic.SPEC,
        "The spec is not valid: a field has a wrong value, or fields contradict each other.",
        "Follow the advice in the message and apply the manifest again.",
    ),
    Reason.NOT_SUPPORTED: ReasonDoc(
        Topic.SPEC,
        "The spec is valid, but this version does not support one of its settings.",
        "Follow the advice in the message, or install a newer version.",
    ),
    Reason.QUEUED: ReasonDoc(
        Topic.WAITING,
        "The queue has not admitted the job yet; the message contains Kueue's reason. Or a pod has a scheduling gate "
        "of another queue.",
        "Check the quota of the queue; no pod of the job starts before it is admitted.",
    ),
    Reason.WAITING_FOR_PODS: ReasonDoc(
        Topic.WAITING, "Pods of the newest attempt are being created, scheduled or started.", NOTHING
    ),
    Reason.UNSCHEDULABLE: ReasonDoc(
        Topic.WAITING,
        "The scheduler finds no node for a pod; the message contains the scheduler's explanation.",
        "Add nodes; or request less in topology.resources, or remove recovery.spot: waiting pods are created again.",
    ),
    Reason.IMAGE_PULL: ReasonDoc(
        Topic.WAITING,
        "The image of a container is not on its node yet; the message contains the kubelet's explanation.",
        "On an error, correct the image's name or the pull secret in podTemplate: waiting pods are created again. An "
        "image of an injected sidecar or init container is set where it is injected.",
    ),
    Reason.CONTAINER_CONFIG: ReasonDoc(
        Topic.WAITING,
        "A pod cannot start because a Secret, a ConfigMap or a volume that it refers to is missing, or because one of "
        "its containers cannot be started.",
        "Create the object that the message names; then the pod starts without further action. Otherwise correct the "
        "container that the message names.",
    ),
    Reason.FAILED_CREATE: ReasonDoc(
        Topic.WAITING,
        "The cluster refused to create a pod or another object of the job. If a quota, a webhook or a Pod Security "
        "Standard refused it, the operator tries again with increasing delay. If podTemplate produces an invalid pod, "
        "the job is not accepted until podTemplate is edited.",
        "Fix the cause that the message names; correct podTemplate if the message names it.",
    ),
    Reason.QUOTA_RELEASED: ReasonDoc(
        Topic.WAITING,
        "The cluster refused some pods of the gang for too long; the other pods were deleted, so that other jobs "
        "can use their quota. All pods are requested again later.",
        "Raise the quota that the message names, request less in topology.resources, or fewer nodes in a new job.",
    ),
    Reason.GANG_RELEASED: ReasonDoc(
        Topic.WAITING,
        "Some pods of the gang had a node and others did not for almost a minute; all of them were deleted, so that "
        "other jobs can use these nodes. All pods are requested again later.",
        "The message names a pod without a node and the reason. Add nodes, request less in topology.resources, or set "
        "topology.minNodes.",
    ),
    Reason.BACK_OFF: ReasonDoc(
        Topic.WAITING,
        "An attempt failed; the next one waits, so that the job does not fail in a tight loop.",
        "Read the last output of the failed attempt in the ledger (status.attempts).",
    ),
    Reason.SUSPENDING: ReasonDoc(Topic.WAITING, "spec.suspend is true; the ranks are saving their state.", NOTHING),
    Reason.SUSPENDED: ReasonDoc(
        Topic.WAITING,
        "spec.suspend is true; the state is saved and the nodes are released.",
        "Set spec.suspend to false to resume.",
    ),
    Reason.LOADING: ReasonDoc(Topic.WORKING, "The ranks load the model and the data set.", NOTHING),
    Reason.CACHING: ReasonDoc(
        Topic.WORKING, "The ranks compute latents and text embeddings; later attempts reuse them.", NOTHING
    ),
    Reason.RESTORING: ReasonDoc(Topic.WORKING, "The ranks verify and load a checkpoint.", NOTHING),
    Reason.TRAINING: ReasonDoc(Topic.WORKING, "The ranks are training.", NOTHING),
    Reason.SAVING: ReasonDoc(Topic.WORKING, "The ranks are writing a checkpoint.", NOTHING),
    Reason.VALIDATING: ReasonDoc(
        Topic.WORKING, "The ranks generate validation images or compute the held-out loss.", NOTHING
    ),
    Reason.EXPORTING: ReasonDoc(Topic.WORKING, "All steps are trained; the outputs are being written.", NOTHING),
    Reason.SILENT: ReasonDoc(
        Topic.WORKING,
        "A pod is running, but the coordinator receives no heartbeats from it, or has never received one.",
        "Check the network between the pod and the coordinator; training itself continues.",
    ),
    Reason.SPEC_APPLIED: ReasonDoc(Topic.WORKING, "All pods were created from the current spec.", NOTHING),
    Reason.SAVE_TAKES_LONGER: ReasonDoc(
        Topic.WORKING,
        "The last save took longer than recovery.noticeSeconds; the message contains both durations.",
        "Raise recovery.noticeSeconds if the capacity gives more notice, or use faster storage.",
    ),
    Reason.SAVE_IN_TIME: ReasonDoc(Topic.WORKING, "A save takes less than recovery.noticeSeconds again.", NOTHING),
    Reason.SLOWER_THAN_PEERS: ReasonDoc(
        Topic.WORKING,
        "A rank needs at least 1.5 times as long as its peers for the same work, and all others wait for it.",
        "Check the node that the message names: clocks of its GPU (temperature, power), other work on its cores, its "
        "storage. Cordon it and delete the pod to move the rank to another node.",
    ),
    Reason.AS_FAST_AS_PEERS: ReasonDoc(
        Topic.WORKING, "All ranks need about the same time for their work again.", NOTHING
    ),
    Reason.NOTICE_SAVED: _capacity(
        "A pod received a preemption notice, and its ranks saved their last step before they exited."
    ),
    Reason.PREEMPTED: _capacity("A pod was terminated with a preemption notice; the cluster did not record the cause."),
    Reason.PREEMPTION_BY_SCHEDULER: _capacity(
        "The scheduler preempted a pod in favor of a pod with a higher priority.",
        "Nothing; if it happens too often, give the job a higher spec.priorityClassName.",
    ),
    Reason.EVICTION_BY_EVICTION_API: _capacity("A pod was evicted through the eviction API, e.g. by kubectl drain."),
    Reason.DELETION_BY_TAINT_MANAGER: _capacity("The node of a pod received a taint that the pod does not tolerate."),
    Reason.EVICTED_BY_QUEUE: _capacity(
        "The queue evicted the job, e.g. for a job with a higher priority, or because its quota shrank. The ranks "
        "saved, the pods were deleted, and the job waits in its queue again.",
        "Nothing: the job continues from its last step when the queue admits it again.",
    ),
    Reason.DELETION_BY_POD_GC: _capacity("The node of a pod no longer exists, and Kubernetes deleted the pod."),
    Reason.TERMINATION_BY_KUBELET: _capacity(
        "The kubelet terminated a pod because its node shuts down or is short of a resource.",
        "Nothing on a shutdown; request more memory or ephemeral storage if the node was short of it.",
    ),
    Reason.POD_DELETED: _capacity("A pod of the attempt was deleted by a user or another controller."),
    Reason.POD_LOST: _capacity("A pod of the attempt disappeared without a report, e.g. because its node failed."),
    Reason.NODE_LOST: _capacity("The node of a pod was deleted, was restarted or no longer responds."),
    Reason.REFUSED_BY_KUBELET: _capacity(
        "The kubelet of a node refused a pod that the scheduler had placed there, e.g. because a device is unhealthy.",
        "Nothing: the next attempt avoids that node. If it happens again, read the kubelet's message in the ledger "
        "(status.attempts), and cordon the node.",
    ),
    Reason.GPU_FAULT: _capacity(
        "A GPU failed: its driver reported a hardware error (XID), a health tool reported the node, or the GPU "
        "computed wrong results in the check before the first step.",
        "Nothing: the next attempt avoids that node and checks all devices first. Have the node repaired; the ledger "
        "(status.attempts) names it, and the GPU and the XID if they are known.",
    ),
    Reason.NETWORK_ERROR: _outage(
        "A server that the trainer needs (the hub, an object store) does not answer, or refuses requests for now.",
        "Check that server and the network of the pods. Further attempts follow with increasing delay; they do not "
        "count towards recovery.maxFailures.",
    ),
    Reason.STORAGE_UNAVAILABLE: _outage(
        "A disk of the job (cache, checkpoints, data set) is full, or its file system fails to read or write.",
        "Free space, or repair the file system that the message names. Further attempts follow with increasing delay; "
        "they do not count towards recovery.maxFailures.",
    ),
    Reason.PROCESS_FAILED: _failure(
        "A rank exited with an error that has no more specific reason.",
        "Read its last output in the ledger (status.attempts) and the log of its pod.",
    ),
    Reason.OUT_OF_MEMORY: _failure(
        "A rank ran out of memory, of the GPU or of the pod.",
        "Request more memory in topology.resources, or let it grow with recovery.maxMemory; or, in a new job, halve "
        "training.batchSize and double training.gradientAccumulation, or set training.gradientCheckpointing to true.",
    ),
    Reason.EVICTED: _failure(
        "The kubelet evicted a pod that used more of a resource than it had requested.",
        "Request more memory or ephemeral storage in topology.resources.",
    ),
    Reason.INIT_CONTAINER_FAILED: _failure(
        "An init container of a pod failed, so its trainer did not start.",
        "Correct the init container that the message names, in podTemplate or where it is injected.",
    ),
    Reason.FABRIC_ERROR: _failure(
        "A rank lost its peers in a collective, and no other cause was found.",
        "Check the network between the nodes; the ledger (status.attempts) contains the error of NCCL or gloo.",
    ),
    Reason.STORAGE_ERROR: _failure(
        "Checkpoints or outputs could not be written or read.",
        "Free space on checkpoint.storage, and make sure that all pods can write to it.",
    ),
    Reason.CHECKPOINT_STALE: _failure(
        "No checkpoint could be written for longer than checkpoint.maxStale, so the attempt was ended.",
        "Free space on checkpoint.storage, or fix the error in the message.",
    ),
    Reason.CHECKPOINT_WRITTEN: ReasonDoc(Topic.WORKING, "Checkpoints can be written again.", NOTHING),
    Reason.DATA_ERROR: _failure(
        "The data set cannot be used with this spec.",
        "Correct the data set and raise spec.recovery.manualRetries; if spec.dataset is wrong, create a new job.",
        final=True,
    ),
    Reason.CONFIGURATION_ERROR: _failure(
        "The trainer cannot run this spec.",
        "Follow the advice in the message and create a new job; or, if the spec is right, raise "
        "spec.recovery.manualRetries.",
        final=True,
    ),
    Reason.HANG: _failure(
        "No step was completed within recovery.hangTimeout.",
        "Check the rank and the node that the ledger (status.attempts) names; raise recovery.hangTimeout if the steps "
        "of this job really take longer.",
    ),
    Reason.SUPERSEDED: ReasonDoc(
        Topic.CAPACITY, "Ranks of an older attempt found that a newer one owns the checkpoints, and exited.", NOTHING
    ),
    Reason.SHRUNK: _regroup(
        "Some pods had no node for longer than recovery.shrinkAfter; the job continues with fewer pods.",
        "Nothing: the job grows again when nodes are available. Add nodes to speed this up.",
    ),
    Reason.GROWN: _regroup("Nodes for more pods are available; the ranks saved, and the job continues with more pods."),
    Reason.FELL_BACK: _regroup(
        "No spot nodes were available for recovery.spot.fallbackAfter; pods without a node now accept any node.",
        "Nothing: the job returns to spot nodes when they are available. Until then the other nodes cost more.",
    ),
    Reason.BACK_TO_SPOT: _regroup("Spot nodes are available again; the ranks saved, and the job continues on them."),
    Reason.PODS_LATE: _regroup(
        "Ranks timed out waiting for a pod without a node or an image; they wait again in a new attempt.",
        "Read in the job's message what the late pod waits for.",
    ),
    Reason.SPEC_EDITED: _regroup(
        "The spec was edited while pods of the attempt were waiting; the pods are created again from the new spec."
    ),
    Reason.TARGET_EDITED: _regroup(
        "The steps, epochs or outputs were edited while the job ran; the ranks saved, and the job continues with the "
        "edit in the same pods."
    ),
    Reason.FINISHED: ReasonDoc(
        Topic.END, "All steps are trained and all outputs are written.", "Fetch the outputs listed in status.outputs."
    ),
    Reason.MAX_FAILURES_EXCEEDED: ReasonDoc(
        Topic.END,
        "The program failed more often than recovery.maxFailures allows without a new checkpoint in between.",
        "Fix the cause of the last failures (see status.attempts) and raise spec.recovery.manualRetries by 1.",
    ),
    Reason.SAME_STEP_FAILURES: ReasonDoc(
        Topic.END,
        "The program failed several times in a row after the same step; another attempt would fail, too.",
        "Read the last output in the ledger (status.attempts): a sample of that step, or the state of the model after "
        "it, is the likely cause.",
    ),
    Reason.EXPORT_FAILED: ReasonDoc(
        Topic.END,
        "All steps are trained, and the pod that writes the remaining outputs has failed for good.",
        "Fix the cause in the message, then raise recovery.manualRetries: only the export is repeated.",
    ),
    Reason.DEADLINE_EXCEEDED: ReasonDoc(
        Topic.END,
        "The job took longer than spec.activeDeadlineSeconds.",
        "Raise spec.activeDeadlineSeconds: the job continues.",
    ),
    Reason.ATTEMPT_STARTED: ReasonDoc(Topic.EVENT, "An attempt starts; its pods are being created.", NOTHING),
    Reason.ATTEMPT_ENDED: ReasonDoc(
        Topic.EVENT,
        "An attempt ended, and its cause is not certain yet; an event with the cause follows.",
        "See the reason of the event that follows.",
    ),
    Reason.RECOVERED: ReasonDoc(
        Topic.EVENT,
        "An attempt completed its first step after another attempt had ended; the message contains the lost time.",
        NOTHING,
    ),
    Reason.CHECKPOINT_COMMITTED: ReasonDoc(
        Topic.EVENT, "The first checkpoint of the job was committed and verified.", NOTHING
    ),
    Reason.TRAINER_WARNING: ReasonDoc(
        Topic.EVENT, "The trainer reports a problem, e.g. a corrupt checkpoint that it skipped.", "Read the message."
    ),
    Reason.OUTPUT_WRITTEN: ReasonDoc(Topic.EVENT, "An output is completely written.", NOTHING),
    Reason.OUTPUT_FAILED: ReasonDoc(
        Topic.EVENT,
        "An output could not be written or delivered; the message names the field and the remedy.",
        "If the job has failed, follow the message, and raise recovery.manualRetries by 1: the next attempt delivers "
        "what is missing. Otherwise nothing: it is tried again.",
    ),
    Reason.MEMORY_RAISED: ReasonDoc(
        Topic.EVENT,
        "The kernel ended a pod because it exceeded its memory; the next pods get more of it, up to "
        "recovery.maxMemory.",
        "Write the new amount into topology.resources.memory of the next job.",
    ),
    Reason.NAME_TAKEN: ReasonDoc(
        Topic.EVENT,
        "An object that the job needs already exists and does not belong to the job.",
        "Delete that object, or create the job under another name.",
    ),
}
"""Documentation of every reason, in the order of the reference."""

OUTAGES = frozenset(reason for reason, doc in REASONS.items() if doc.counts_as is CountsAs.OUTAGE)
"""Reasons of attempts that ended because a service did not work."""
REGROUPS = frozenset(reason for reason, doc in REASONS.items() if doc.topic is Topic.REGROUP)
"""Reasons of attempts that ended only to change the gang: no pod failed, so they count as neither."""
