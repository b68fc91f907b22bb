"""Reasons in the status, the conditions, the ledger and events, each with its meaning and remedy.

docs/reference/reasons.md is generated from REASONS.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CountsAs(StrEnum):
    """What the end of an attempt is counted as. An end that is neither counts as nothing."""

    PREEMPTION = "Preemption"
    """Capacity ended it: spends nothing of recovery.maxFailures."""
    FAILURE = "Failure"
    """The program ended it: spends one of recovery.maxFailures."""


class Reason(StrEnum):
    """Why a job is where it is, and why an attempt ended: status.reason, conditions, the ledger and events."""

    ACCEPTED = "Accepted"
    INVALID_SPEC = "InvalidSpec"
    NOT_SUPPORTED = "NotSupported"

    QUEUED = "Queued"
    WAITING_FOR_PODS = "WaitingForPods"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL = "ImagePull"
    CONTAINER_CONFIG = "ContainerConfig"
    FAILED_CREATE = "FailedCreate"
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
    SAVE_TAKES_LONGER = "SaveTakesLonger"
    SAVE_IN_TIME = "SaveInTime"

    NOTICE_SAVED = "NoticeSaved"
    PREEMPTED = "Preempted"
    PREEMPTION_BY_SCHEDULER = "PreemptionByScheduler"
    EVICTION_BY_EVICTION_API = "EvictionByEvictionAPI"
    DELETION_BY_TAINT_MANAGER = "DeletionByTaintManager"
    DELETION_BY_POD_GC = "DeletionByPodGC"
    TERMINATION_BY_KUBELET = "TerminationByKubelet"
    POD_DELETED = "PodDeleted"
    POD_LOST = "PodLost"
    NODE_LOST = "NodeLost"

    PROCESS_FAILED = "ProcessFailed"
    OUT_OF_MEMORY = "OutOfMemory"
    EVICTED = "Evicted"
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

    FINISHED = "Finished"
    MAX_FAILURES_EXCEEDED = "MaxFailuresExceeded"
    SAME_STEP_FAILURES = "SameStepFailures"
    DEADLINE_EXCEEDED = "DeadlineExceeded"

    ATTEMPT_STARTED = "AttemptStarted"
    ATTEMPT_ENDED = "AttemptEnded"
    RECOVERED = "Recovered"
    CHECKPOINT_COMMITTED = "CheckpointCommitted"
    TRAINER_WARNING = "TrainerWarning"
    OUTPUT_WRITTEN = "OutputWritten"
    NAME_TAKEN = "NameTaken"


class Topic(StrEnum):
    """What a reason speaks of; the sections of its documentation."""

    SPEC = "Is the spec accepted?"
    WAITING = "What does the job wait for?"
    WORKING = "What is it doing?"
    CAPACITY = "Why was an attempt taken away?"
    FAILURE = "Why did an attempt fail?"
    REGROUP = "Why was the gang put together anew?"
    END = "How did the job end?"
    EVENT = "Seen as events only"


@dataclass(frozen=True)
class ReasonDoc:
    """What a reason means and what a person should do about it."""

    topic: Topic
    meaning: str
    do: str
    counts_as: CountsAs | None = None
    """What an attempt that ended so is counted as; None: nothing."""
    final: bool = False
    """Whether trying again cannot help: the job fails at once."""


NOTHING = "Nothing."
_RESUMES = "Nothing: the next attempt goes on from the last checkpoint."


def _capacity(meaning: str, do: str = _RESUMES) -> ReasonDoc:
    return ReasonDoc(Topic.CAPACITY, meaning, do, CountsAs.PREEMPTION)


def _failure(meaning: str, do: str, *, final: bool = False) -> ReasonDoc:
    return ReasonDoc(Topic.FAILURE, meaning, do, CountsAs.FAILURE, final)


def _regroup(meaning: str, do: str = NOTHING) -> ReasonDoc:
    return ReasonDoc(Topic.REGROUP, meaning, do)


REASONS: dict[Reason, ReasonDoc] = {
    Reason.ACCEPTED: ReasonDoc(Topic.SPEC, "The spec can be run.", NOTHING),
    Reason.INVALID_SPEC: ReasonDoc(
        Topic.SPEC, "The spec contradicts itself or cannot be read.", "Write what the message says and apply again."
    ),
    Reason.NOT_SUPPORTED: ReasonDoc(
        Topic.SPEC,
        "The spec is right, but this version of the operator or of the trainer cannot do it.",
        "Take the way that the message names, or a newer version.",
    ),
    Reason.QUEUED: ReasonDoc(
        Topic.WAITING,
        "A pod has a scheduling gate: the queue that put it there has not admitted it yet.",
        "Look at the queue's quota; nothing of the job runs until it is admitted.",
    ),
    Reason.WAITING_FOR_PODS: ReasonDoc(
        Topic.WAITING, "Pods of the newest attempt are created, placed or started.", NOTHING
    ),
    Reason.UNSCHEDULABLE: ReasonDoc(
        Topic.WAITING,
        "The scheduler has no room for a pod; the message holds its own words.",
        "Add nodes; or ask for less in topology.resources or leave recovery.spot out, then suspend the job and "
        "resume it.",
    ),
    Reason.IMAGE_PULL: ReasonDoc(
        Topic.WAITING,
        "A pod's image is not there yet; the message holds the kubelet's words.",
        "On an error, put the image's name or the pull secret in podTemplate right, then suspend the job and "
        "resume it.",
    ),
    Reason.CONTAINER_CONFIG: ReasonDoc(
        Topic.WAITING,
        "A pod cannot start, because a Secret, a ConfigMap or a volume that it names is missing.",
        "Create what the message names; the pod starts by itself.",
    ),
    Reason.FAILED_CREATE: ReasonDoc(
        Topic.WAITING,
        "The cluster refused a pod or another object of the job. For a quota, a webhook or a Pod Security Standard, it "
        "is tried again, ever more seldom. For a podTemplate that makes no valid pod, the job is not accepted until "
        "it is edited.",
        "Do what the message asks for; put podTemplate right where it is at fault.",
    ),
    Reason.BACK_OFF: ReasonDoc(
        Topic.WAITING,
        "An attempt failed, and the next one waits so that it does not fail in a circle.",
        "Read the last words of the failed attempt in the ledger.",
    ),
    Reason.SUSPENDING: ReasonDoc(Topic.WAITING, "spec.suspend is true; the ranks are saving their state.", NOTHING),
    Reason.SUSPENDED: ReasonDoc(
        Topic.WAITING,
        "spec.suspend is true; the state is saved and the machines are given back.",
        "Set spec.suspend to false to go on.",
    ),
    Reason.LOADING: ReasonDoc(Topic.WORKING, "The ranks read the model and the data set.", NOTHING),
    Reason.CACHING: ReasonDoc(Topic.WORKING, "The ranks compute latents and text embeddings, once.", NOTHING),
    Reason.RESTORING: ReasonDoc(Topic.WORKING, "The ranks verify a checkpoint and read it.", NOTHING),
    Reason.TRAINING: ReasonDoc(Topic.WORKING, "Steps are being trained.", NOTHING),
    Reason.SAVING: ReasonDoc(Topic.WORKING, "A checkpoint is being written.", NOTHING),
    Reason.VALIDATING: ReasonDoc(
        Topic.WORKING, "Validation pictures are drawn, or the held-out loss is taken.", NOTHING
    ),
    Reason.EXPORTING: ReasonDoc(Topic.WORKING, "All steps are trained; the outputs are being written.", NOTHING),
    Reason.SILENT: ReasonDoc(
        Topic.WORKING,
        "A pod runs, but its supervisor has not been heard for a while.",
        "Look at the network between the pod and the coordinator; training itself goes on.",
    ),
    Reason.SAVE_TAKES_LONGER: ReasonDoc(
        Topic.WORKING,
        "The last save took longer than recovery.noticeSeconds; the message has both figures.",
        "Raise recovery.noticeSeconds where the capacity gives more notice, or use faster storage.",
    ),
    Reason.SAVE_IN_TIME: ReasonDoc(Topic.WORKING, "A save fits into recovery.noticeSeconds again.", NOTHING),
    Reason.NOTICE_SAVED: _capacity("A pod was told to stop, and its ranks saved their last step before they left."),
    Reason.PREEMPTED: _capacity("A pod was taken away with notice; the cluster did not say by whom."),
    Reason.PREEMPTION_BY_SCHEDULER: _capacity(
        "A pod had to make room for one of a higher priority.",
        "Nothing; where it happens too often, give the job a higher spec.priorityClassName.",
    ),
    Reason.EVICTION_BY_EVICTION_API: _capacity("A pod was evicted through the API, as kubectl drain does."),
    Reason.DELETION_BY_TAINT_MANAGER: _capacity("A pod's node got a taint that the pod does not tolerate."),
    Reason.DELETION_BY_POD_GC: _capacity("A pod's node is gone, and the pod was cleaned up after it."),
    Reason.TERMINATION_BY_KUBELET: _capacity(
        "A node ended the pod, because it shuts down or runs short of a resource.",
        "Nothing on a shutdown; ask for more memory or ephemeral storage when the node ran short.",
    ),
    Reason.POD_DELETED: _capacity("Somebody deleted a pod of the attempt."),
    Reason.POD_LOST: _capacity("A pod of the attempt is gone and said nothing, as when its node vanishes."),
    Reason.NODE_LOST: _capacity("A pod's node is gone or no longer answers."),
    Reason.PROCESS_FAILED: _failure(
        "A rank ended with an error that has no better name.", "Read its last words in the ledger and the pod's log."
    ),
    Reason.OUT_OF_MEMORY: _failure(
        "A rank ran out of memory, of the GPU or of the pod.",
        "Ask for more memory in topology.resources; or, in a new job, halve training.batchSize and double "
        "training.gradientAccumulation, or switch gradientCheckpointing on.",
    ),
    Reason.EVICTED: _failure(
        "The node ended the pod, because the pod used more of a resource than it had asked for.",
        "Ask for more memory or ephemeral storage in topology.resources.",
    ),
    Reason.FABRIC_ERROR: _failure(
        "A rank lost its peers in a collective, and no other cause was found.",
        "Look at the network between the nodes; NCCL's or gloo's own words are in the ledger.",
    ),
    Reason.STORAGE_ERROR: _failure(
        "Checkpoints or outputs could not be written or read.",
        "Make room on checkpoint.storage, or see to it that all pods can write there.",
    ),
    Reason.CHECKPOINT_STALE: _failure(
        "No checkpoint could be written for longer than checkpoint.maxStale: going on would have lost more.",
        "Make room on checkpoint.storage, or see to it that it can be written; the message says what was wrong.",
    ),
    Reason.CHECKPOINT_WRITTEN: ReasonDoc(Topic.WORKING, "Checkpoints can be written again.", NOTHING),
    Reason.DATA_ERROR: _failure(
        "The data set cannot be used as the spec asks.", "Put spec.dataset right and create the job anew.", final=True
    ),
    Reason.CONFIGURATION_ERROR: _failure(
        "The trainer cannot run what the spec asks for.",
        "Write what the message says and create the job anew.",
        final=True,
    ),
    Reason.HANG: _failure(
        "No step was finished within recovery.hangTimeout.",
        "Look at the rank and the node that the ledger names; raise recovery.hangTimeout where steps just take longer.",
    ),
    Reason.SUPERSEDED: ReasonDoc(
        Topic.CAPACITY, "Ranks of an older attempt found that a newer one owns the checkpoints, and left.", NOTHING
    ),
    Reason.SHRUNK: _regroup(
        "There was no room for some pods for recovery.shrinkAfter; the job goes on with fewer.",
        "Nothing: it grows back when there is room. Add nodes to have it faster.",
    ),
    Reason.GROWN: _regroup("There is room for more pods again; all saved, and the job goes on with more."),
    Reason.FELL_BACK: _regroup(
        "There were no spot nodes for recovery.spot.fallbackAfter; pods without a node now ask for any.",
        "Nothing: the job goes back to spot nodes when there are some. Until then the others cost more.",
    ),
    Reason.BACK_TO_SPOT: _regroup("Spot nodes are there again; all saved, and the job goes on there."),
    Reason.PODS_LATE: _regroup(
        "Ranks gave up waiting for a pod that had no node or no image yet; they wait anew.",
        "Read what the late pod waits for in the job's message.",
    ),
    Reason.FINISHED: ReasonDoc(
        Topic.END, "All steps are trained and all outputs written.", "Fetch what status.outputs names."
    ),
    Reason.MAX_FAILURES_EXCEEDED: ReasonDoc(
        Topic.END,
        "The program failed more often than recovery.maxFailures allows without a newer checkpoint in between.",
        "Mend what the last attempts in the ledger died of; create the job anew.",
    ),
    Reason.SAME_STEP_FAILURES: ReasonDoc(
        Topic.END,
        "The program failed several times in a row after the same step: trying again will not help.",
        "Read the last words in the ledger: a sample of that step, or the state that it comes to, is the likely cause.",
    ),
    Reason.DEADLINE_EXCEEDED: ReasonDoc(
        Topic.END,
        "The job took longer than spec.activeDeadlineSeconds.",
        "In a new job, raise spec.activeDeadlineSeconds or train fewer steps.",
    ),
    Reason.ATTEMPT_STARTED: ReasonDoc(Topic.EVENT, "An attempt was decided; its pods are being created.", NOTHING),
    Reason.ATTEMPT_ENDED: ReasonDoc(
        Topic.EVENT, "An attempt ended; the message names the cause, the rank and the node.", "See the cause."
    ),
    Reason.RECOVERED: ReasonDoc(
        Topic.EVENT,
        "An attempt finished its first step after another one had ended; the message says what that cost.",
        NOTHING,
    ),
    Reason.CHECKPOINT_COMMITTED: ReasonDoc(Topic.EVENT, "A first checkpoint was committed and verified.", NOTHING),
    Reason.TRAINER_WARNING: ReasonDoc(
        Topic.EVENT,
        "The trainer noticed something, e.g. a corrupt checkpoint that it passed over.",
        "Read the message.",
    ),
    Reason.OUTPUT_WRITTEN: ReasonDoc(Topic.EVENT, "An output was written whole.", NOTHING),
    Reason.NAME_TAKEN: ReasonDoc(
        Topic.EVENT,
        "An object that the job needs is there already and belongs to somebody else.",
        "Delete that object, or create the job anew under another name.",
    ),
}
"""Every reason's documentation, in the order in which a person looks for it."""

REGROUPS = frozenset(reason for reason, doc in REASONS.items() if doc.topic is Topic.REGROUP)
"""Ends of an attempt that were decided for the sake of another gang: no pod is to blame, and they count as nothing."""
