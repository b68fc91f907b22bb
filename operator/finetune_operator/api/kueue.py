"""Names of Kueue's API (`kueue.x-k8s.io`), and the queue that a job requests.

A job requests a queue with spec.queueName, or with the label that every other kind of job uses for Kueue.
"""

from __future__ import annotations

from finetune_operator.api.job import FineTuneJob

GROUP = "kueue.x-k8s.io"
API_VERSION = f"{GROUP}/v1beta2"
WORKLOAD = "Workload"
MULTIKUEUE = f"{GROUP}/multikueue"
"""Value of spec.managedBy of a job that Kueue runs in another cluster."""

QUEUE_LABEL = f"{GROUP}/queue-name"
PRIORITY_CLASS_LABEL = f"{GROUP}/priority-class"
"""Label of a job: its WorkloadPriorityClass."""
MAX_SECONDS_LABEL = f"{GROUP}/max-exec-time-seconds"
"""Label of a job: the time that it may be admitted for."""
JOB_UID_LABEL = f"{GROUP}/job-uid"
"""Label of a Workload: the UID of its job, for messages of Kueue."""
PREBUILT_LABEL = f"{GROUP}/prebuilt-workload-name"
"""Label of a job that MultiKueue has created: the Workload, which exists already."""
POD_SET_LABEL = f"{GROUP}/podset"
"""Label of a pod that Kueue places by its topology: the pod set."""

PRIORITY_BOOST = f"{GROUP}/priority-boost"
"""Annotation of a Workload: a number that is added to its priority."""
ELASTIC = f"{GROUP}/elastic-job"
"""Annotation of a Workload that may replace another one, or be replaced."""
REPLACES = f"{GROUP}/workload-slice-replacement-for"
"""Annotation of a Workload: namespace and name of the smaller one that it replaces when it is admitted."""
POD_WORKLOAD = f"{GROUP}/workload"
"""Annotation of a pod: its Workload."""
TOPOLOGY_GATE = f"{GROUP}/topology"
"""Scheduling gate that Kueue removes when it has chosen the pod's node by the topology."""

POD_SET = "main"
"""Name of the only pod set: all pods of a gang are alike."""


def queue_of(job: FineTuneJob) -> str | None:
    """Return the queue that a job requests; None if it requests none."""
    return job.spec.queue_name or job.metadata.labels.get(QUEUE_LABEL) or None


def find_contradiction(job: FineTuneJob) -> str | None:
    """Return what is wrong with a job that names two queues; None if nothing is."""
    label, field = job.metadata.labels.get(QUEUE_LABEL), job.spec.queue_name
    if not label or not field or label == field:
        return None
    return (
        f"spec.queueName is {field!r}, and the label {QUEUE_LABEL} is {label!r}; leave one of them out, or write the "
        "same queue in both"
    )
