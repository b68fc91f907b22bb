"""What the API server would not create: remembered for the plan, with a sentence for the status.

An object that is wrong in itself would be refused again and again: it is held back until the job is edited, and tried
once in a while, for a policy may have changed. What a quota or a right refuses is tried by the worker's back-off.
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
WRONG = frozenset({BAD_REQUEST, UNPROCESSABLE})
"""Answers to a create that say that the object itself is wrong."""
REFUSED = WRONG | {FORBIDDEN}
"""Answers to a create that a person must do something about."""
HOLD = timedelta(seconds=60)
"""How long what is wrong in itself is held back."""
UNKNOWN_FIELD = re.compile(r'unknown field "([^"]+)"')
SIMILAR = 0.75
"""How alike two names are of which one is a slip of the pen."""
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
"""Fields of pods that people write into a podTemplate."""


class _Kept(NamedTuple):
    uid: str
    generation: int
    refusal: Refusal


class Refusals:
    """The newest refusal of each job, while its spec stays as it was refused."""

    def __init__(self) -> None:
        self._kept: dict[JobKey, _Kept] = {}

    def take(self, key: JobKey, job: FineTuneJob, refusal: Refusal) -> None:
        """Remember one."""
        self._kept[key] = _Kept(job.metadata.uid, job.metadata.generation, refusal)

    def of(self, key: JobKey, job: FineTuneJob) -> Refusal | None:
        """What was refused of a job as it is now."""
        kept = self._kept.get(key)
        if kept is None or (kept.uid, kept.generation) != (job.metadata.uid, job.metadata.generation):
            return None
        return kept.refusal

    def forget(self, key: JobKey) -> None:
        """Something was created, or the job is gone."""
        self._kept.pop(key, None)


def judge(job: FineTuneJob, kind: str, name: str, error: ApiError, now: datetime) -> Refusal | None:
    """What an answer to a create means for its job; None: nothing that a person could do anything about."""
    if error.status not in REFUSED:
        return None
    if error.status not in WRONG:
        return Refusal(f"{kind} {name} was refused: {error.message}")
    return Refusal(_explain(job, kind, error.message), hold_until=now + HOLD)


def _explain(job: FineTuneJob, kind: str, message: str) -> str:
    if kind != "Pod" or job.spec.pod_template is None:
        return f"the cluster takes no {kind} of this job: {_as_clause(message)}; show this to whoever runs the cluster"
    if fields := UNKNOWN_FIELD.findall(message):
        return " ".join(f"{_misspelt(field)}." for field in fields).removesuffix(".")
    return f"spec.podTemplate: the cluster takes no such pod: {_as_clause(message)}; put it right and apply again"


def _misspelt(field: str) -> str:
    parent, _, name = field.rpartition(".")
    close = difflib.get_close_matches(name, FIELDS, n=1, cutoff=SIMILAR)
    there = re.sub(r"\[[0-9]+]", "", f"pod.{parent}".rstrip("."))
    instead = f"write {close[0]}" if close else f"write one that 'kubectl explain {there}' shows"
    return f"spec.podTemplate.{field}: a pod has no field {name}; {instead}, or leave it out"


def _as_clause(message: str) -> str:
    return message.strip().rstrip(".")
