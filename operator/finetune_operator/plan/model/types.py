"""What `plan` is told and what it answers. Plain frozen data: a cluster, real or not, makes and carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from finetune_contract.heartbeat import Heartbeat, Termination
from finetune_operator.api.job import FineTuneJobStatus

IMAGE_ERRORS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
"""How a kubelet's words begin that cannot pull an image."""
Manifest = Mapping[str, Any]


class PodPhase(StrEnum):
    """Kubernetes' pod phases."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True)
class ObservedPod:
    """What the plan reads of a pod; nothing else is kept in memory."""

    name: str
    uid: str
    attempt: int
    node_rank: int
    phase: PodPhase
    created_at: datetime
    node: str | None = None
    """Where it was scheduled; None while it waits for room."""
    deleted_at: datetime | None = None
    """When its deletion was asked for (Kubernetes' deletionTimestamp less the grace period)."""
    grace: timedelta = timedelta(0)
    """Its deletion grace period; meaningful while `deleted_at` is set."""
    ready: bool = False
    exit_code: int | None = None
    finished_at: datetime | None = None
    """When its container ended, where that is known."""
    termination: Termination | None = None
    """The supervisor's last words, where it had time for them."""
    disruption: str | None = None
    """Reason of a True DisruptionTarget condition."""
    reason: str | None = None
    """status.reason, or the container's: Evicted, OOMKilled, ..."""
    fell_back: bool = False
    """Whether it may take other nodes than spot although the job asks for spot."""
    waiting: str | None = None
    """Why it is not running yet: the scheduler's words or the container's waiting reason and message."""


@dataclass(frozen=True, slots=True)
class ReceivedHeartbeat:
    """The newest beat of a pod and when it came, by the coordinator's clock."""

    beat: Heartbeat
    received_at: datetime


@dataclass(frozen=True)
class ObservedNode:
    """What matters of a node that is not simply well."""

    lost: bool = False
    """The control plane does not hear of it (Ready is Unknown)."""
    gone: bool = False
    """The API shows no such node any more."""
    leaving: str = ""
    """The taint that announces its end; empty where none does."""


WELL = ObservedNode()
"""A node that nothing is known of."""


@dataclass(frozen=True)
class Refusal:
    """An object of the job that the cluster would not take."""

    sentence: str
    """What was refused, and why; for what is wrong in itself, what to write instead."""
    hold_until: datetime | None = None
    """Where the object is wrong in itself: until when there is no use in trying again. None: it may be taken later."""


@dataclass(frozen=True)
class Observed:
    """The world as it was last seen. May lag behind; never ahead."""

    pods: tuple[ObservedPod, ...] = ()
    beats: Mapping[str, ReceivedHeartbeat] = field(default_factory=dict)
    """By pod UID."""
    services: frozenset[str] = frozenset()
    """Names of the job's services that exist."""
    configs: frozenset[str] = frozenset()
    """Names of the job's ConfigMaps that exist."""
    nodes: Mapping[str, ObservedNode] = field(default_factory=dict)
    """Nodes of the job's pods, those that are gone included, that are not simply well, by name. Others are well."""
    refusal: Refusal | None = None
    """What was refused last of the job as it is now; None: nothing, or something has been created since."""
    beat_seconds: float = 0.0
    """Time between two beats that supervisors are asked for, where that is longer than the settings say."""


@dataclass(frozen=True)
class Create:
    """Create an object. That it already exists is success."""

    manifest: Manifest


@dataclass(frozen=True)
class DeletePod:
    """Delete a pod, only if it is still the one with this UID. That it is gone is success."""

    name: str
    uid: str
    grace_seconds: int | None = None
    """None: the pod's own grace period."""


@dataclass(frozen=True)
class DeleteJob:
    """Delete the job itself (its time to live is over)."""


Action = Create | DeletePod | DeleteJob


@dataclass(frozen=True)
class Event:
    """Something that a person wants to know. Emitted only after the status was written."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True)
class Plan:
    """One pass: the status to write first, then the actions, then the events."""

    status: FineTuneJobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    look_again: timedelta | None = None
    """Plan anew after so long even if nothing happens; None: only when something does."""
