"""Creations that the API server refused: recorded for the plan, with a message for the status.

The API server would refuse an invalid object each time: its job is held until it is edited, and retried at intervals
in case a policy has changed. After a refusal by a quota or by RBAC, the worker retries with its backoff.
"""

from __future__ import annotations

import difflib
import re
from datetime import datetime, timedelta
from typing import NamedTuple

from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.kube.client.client import BAD_REQUEST, ApiError
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.plan.model.types import Refusal

FORBIDDEN, UNPROCESSABLE = 403, 422
INVALID = frozenset({BAD_REQUEST, UNPROCESSABLE})
"""Status codes of a creation that mean that the object itself is invalid."""
REFUSED = INVALID | {FORBIDDEN}
"""Status codes of a creation that require an action of the user or the administrator."""
HOLD = timedelta(seconds=60)
"""Delay before an invalid object of a job is created again."""
UNKNOWN_FIELD = re.compile(r'unknown field "([^"]+)"')
SIMILARITY = 0.75
"""Similarity of two names at which one counts as a misspelling of the other."""
FIELDS = re.findall(
    r"\w+",
    """
    metadata spec labels annotations activeDeadlineSeconds affinity automountServiceAccountToken containers dnsConfig
    dnsPolicy enableServiceLinks hostAliases hostIPC hostNetwork hostPID hostUsers imagePullSecrets initContainers
    nodeSelector preemptionPolicy priorityClassName resourceClaims restartPolicy runtimeClassName schedulerName
    schedulingGates securityContext serviceAccountName shareProcessNamespace terminationGracePeriodSeconds tolerations
    topologySpreadConstraints volumes args command env envFrom image imagePullPolicy lifecycle livenessProbe name ports
    readinessProbe resizePolicy resources startupProbe terminationMessagePath terminationMessagePolicy volumeDevices
    volumeMounts workingDir limits requests claims fsGroup runAsGroup runAsNonRoot runAsUser seccompProfile
    supplementalGroups capabilities privileged readOnlyRootFilesystem allowPrivilegeEscalation mountPath subPath
    readOnly key operator value effect tolerationSeconds nodeAffinity podAffinity podAntiAffinity maxSkew topologyKey
    whenUnsatisfiable labelSelector matchLabels emptyDir configMap secret hostPath persistentVolumeClaim claimName
    sizeLimit medium defaultMode items optional valueFrom fieldRef secretKeyRef configMapKeyRef
    """,
)
"""Pod fields that are typical in a podTemplate, for suggestions."""


class _RecordedRefusal(NamedTuple):
    uid: str
    generation: int
    refusal: Refusal


class Refusals:
    """The newest refusal of each job, valid until its spec changes."""

    def __init__(self) -> None:
        self._recorded: dict[JobKey, _RecordedRefusal] = {}

    def record(self, key: JobKey, job: FineTuneJob, refusal: Refusal) -> None:
        """Record a refusal for the job's current generation."""
        self._recorded[key] = _RecordedRefusal(job.metadata.uid, job.metadata.generation, refusal)

    def get(self, key: JobKey, job: FineTuneJob) -> Refusal | None:
        """Return the refusal of the job's current generation; None if there is none."""
        recorded = self._recorded.get(key)
        if recorded is None or (recorded.uid, recorded.generation) != (job.metadata.uid, job.metadata.generation):
            return None
        return recorded.refusal

    def forget(self, key: JobKey) -> None:
        """Drop the refusal of a job: a creation succeeded, or the job was deleted."""
        self._recorded.pop(key, None)


def classify_refusal(job: FineTuneJob, kind: str, name: str, error: ApiError, now: datetime) -> Refusal | None:
    """Return what a failed creation means for its job; None if no user action is needed."""
    if error.status not in REFUSED:
        return None
    if error.status not in INVALID:
        return Refusal(f"the API server refused to create {kind} {name}: {error.message}")
    return Refusal(_explain(job, kind, error.message), hold_until=now + HOLD)


def _explain(job: FineTuneJob, kind: str, message: str) -> str:
    if kind != "Pod" or job.spec.pod_template is None:
        return f"the API server rejects the {kind} of this job: {_as_clause(message)}; ask your cluster administrator"
    if fields := UNKNOWN_FIELD.findall(message):
        return " ".join(f"{_describe_unknown(field)}." for field in fields).removesuffix(".")
    return (
        f"spec.podTemplate: the API server rejects the pod: {_as_clause(message)}; "
        "correct spec.podTemplate and apply the job again"
    )


def _describe_unknown(field: str) -> str:
    parent, _, name = field.rpartition(".")
    similar = difflib.get_close_matches(name, FIELDS, n=1, cutoff=SIMILARITY)
    path = re.sub(r"\[[0-9]+]", "", f"pod.{parent}".rstrip("."))
    instead = f"write {similar[0]}" if similar else f"write a field that 'kubectl explain {path}' lists"
    return f"spec.podTemplate.{field}: a pod has no field {name}; {instead}, or remove it"


def _as_clause(message: str) -> str:
    return message.strip().rstrip(".")
