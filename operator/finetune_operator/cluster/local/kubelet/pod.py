"""One pod of the local cluster: its Kubernetes object, its files, and changes of the object. It starts no processes.

Pods are stored in the API server's format, so that the same function reads the pods of both kinds of cluster.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from finetune_contract import environment
from finetune_operator.cluster.local.kubelet.container import main_container
from finetune_operator.cluster.local.kubelet.processes import ProcessId
from finetune_operator.plan.model.types import Manifest, PodPhase

CORES = "local.finetune-operator.io/cores"
"""Annotation: the cores that the pod is pinned to, '0,1'."""
GPUS = "local.finetune-operator.io/gpus"
"""Annotation: the devices that the pod may use."""
SHORT_REASONS = {0: "Completed"}


@dataclass(frozen=True)
class PodFiles:
    """The files of one pod."""

    folder: Path

    @property
    def pod(self) -> Path:
        """The pod object."""
        return self.folder / "pod.json"

    @property
    def container(self) -> Path:
        """The request to the shim: the process to start."""
        return self.folder / "container.json"

    @property
    def process(self) -> Path:
        """Written by the shim: the identities of the running processes."""
        return self.folder / "process.json"

    @property
    def exit(self) -> Path:
        """Written by the shim: the exit code."""
        return self.folder / "exit.json"

    @property
    def termination_log(self) -> Path:
        """Written by the supervisor: its termination message."""
        return self.folder / "termination-log"


@dataclass(frozen=True)
class Processes:
    """The processes of a started pod."""

    container: ProcessId
    shim: ProcessId

    @classmethod
    def from_json(cls, value: Any) -> Processes:
        """Parse what the shim wrote."""
        return cls(ProcessId.from_json(value["container"]), ProcessId.from_json(value["shim"]))


class Pod:
    """A pod's object in memory and its changes."""

    def __init__(self, value: dict[str, Any], files: PodFiles) -> None:
        self.value = value
        self.files = files
        self.processes: Processes | None = None

    @classmethod
    def new(cls, manifest: Manifest, uid: str, now: datetime, files: PodFiles) -> Pod:
        """Return a new pod as the API server stores it."""
        value = copy.deepcopy(dict(manifest))
        value["metadata"] = {**value["metadata"], "uid": uid, "creationTimestamp": format_timestamp(now)}
        value["spec"] = {**value["spec"]}
        value["status"] = {"phase": PodPhase.PENDING.value, "conditions": []}
        return cls(value, files)

    @classmethod
    def from_json(cls, value: Any, files: PodFiles) -> Pod:
        """Parse a stored pod.

        Raises:
            ValueError, TypeError, KeyError: the value is not a pod.
        """
        for field in (value["metadata"]["name"], value["metadata"]["uid"], value["status"]["phase"]):
            if not isinstance(field, str):
                raise TypeError(f"{field!r} is not text")
        datetime.fromisoformat(value["metadata"]["creationTimestamp"])
        main_container(value)
        return cls(value, files)

    @property
    def name(self) -> str:
        """Name of the pod."""
        return str(self.value["metadata"]["name"])

    @property
    def uid(self) -> str:
        """UID of the pod."""
        return str(self.value["metadata"]["uid"])

    @property
    def phase(self) -> PodPhase:
        """Phase of the pod."""
        return PodPhase(self.value["status"]["phase"])

    @property
    def ended(self) -> bool:
        """Return whether the container has ended."""
        return self.phase in (PodPhase.SUCCEEDED, PodPhase.FAILED)

    @property
    def deleted(self) -> bool:
        """Return whether its deletion was requested."""
        return "deletionTimestamp" in self.value["metadata"]

    @property
    def kill_at(self) -> datetime:
        """End of its grace period; only valid if `deleted`."""
        return datetime.fromisoformat(self.value["metadata"]["deletionTimestamp"])

    @property
    def grace_seconds(self) -> int:
        """Seconds between SIGTERM and SIGKILL."""
        return int(self.value["spec"].get("terminationGracePeriodSeconds", 30))

    @property
    def cores(self) -> frozenset[int]:
        """Cores that it is pinned to; empty before its start."""
        text = (self.value["metadata"].get("annotations") or {}).get(CORES, "")
        return frozenset(int(core) for core in text.split(",") if core)

    @property
    def gpus(self) -> tuple[str, ...]:
        """Devices that it may use."""
        text = (self.value["metadata"].get("annotations") or {}).get(GPUS, "")
        return tuple(gpu for gpu in text.split(",") if gpu)

    def variable(self, name: str) -> str | None:
        """Return a plain variable of its main container's environment; None if it does not exist."""
        entries = main_container(self.value).get("env") or ()
        return next((str(entry.get("value", "")) for entry in entries if entry["name"] == name), None)

    @property
    def num_pods(self) -> int:
        """Number of pods of its gang."""
        return int(self.variable(environment.NUM_NODES) or 1)

    @property
    def attempt(self) -> int:
        """Attempt that it belongs to."""
        return int(self.variable(environment.ATTEMPT) or 1)

    def assign(self, node: str, cores: frozenset[int], gpus: tuple[str, ...]) -> None:
        """Assign a node, cores and devices to the pod."""
        self.value["spec"]["nodeName"] = node
        annotations = {CORES: ",".join(map(str, sorted(cores))), GPUS: ",".join(gpus)}
        metadata = self.value["metadata"]
        metadata["annotations"] = {**(metadata.get("annotations") or {}), **annotations}

    def set_waiting(self, reason: str, message: str) -> bool:
        """Record why the pod cannot start yet. Return whether the reason is new."""
        state = {"waiting": {"reason": reason, "message": message}}
        is_new = self._container_state() != state
        self._set_container(state, ready=False)
        return is_new

    def set_running(self, now: datetime) -> None:
        """Record that the container runs."""
        status = self.value["status"]
        status["phase"] = PodPhase.RUNNING.value
        status["startTime"] = format_timestamp(now)
        self._set_condition("Ready", "True", "", "", now)
        self._set_container({"running": {"startedAt": format_timestamp(now)}}, ready=True)

    def set_ended(self, exit_code: int, message: str, now: datetime) -> None:
        """Record that the container ended."""
        phase = PodPhase.SUCCEEDED if exit_code == 0 else PodPhase.FAILED
        self.value["status"]["phase"] = phase.value
        self._set_condition("Ready", "False", "PodCompleted", "", now)
        terminated = {
            "exitCode": exit_code,
            "reason": SHORT_REASONS.get(exit_code, "Error"),
            "message": message,
            "finishedAt": format_timestamp(now),
        }
        self._set_container({"terminated": terminated}, ready=False)

    def set_deleted(self, grace_seconds: int, now: datetime) -> bool:
        """Record a deletion request. A later request can only shorten the grace period. Return whether it changed."""
        kill_at = now + timedelta(seconds=grace_seconds)
        if self.deleted and self.kill_at <= kill_at:
            return False
        metadata = self.value["metadata"]
        metadata["deletionTimestamp"] = format_timestamp(kill_at)
        metadata["deletionGracePeriodSeconds"] = grace_seconds
        return True

    def set_disrupted(self, reason: str, message: str, now: datetime) -> None:
        """Record that the infrastructure, not the program, ends the pod."""
        self._set_condition("DisruptionTarget", "True", reason, message, now)

    def _container_state(self) -> Mapping[str, Any]:
        statuses = self.value["status"].get("containerStatuses") or [{}]
        state: Mapping[str, Any] = statuses[0].get("state") or {}
        return state

    def _set_container(self, state: dict[str, Any], *, ready: bool) -> None:
        name = main_container(self.value)["name"]
        self.value["status"]["containerStatuses"] = [{"name": name, "ready": ready, "state": state}]

    def _set_condition(self, kind: str, status: str, reason: str, message: str, now: datetime) -> None:
        condition = {"type": kind, "status": status, "lastTransitionTime": format_timestamp(now)}
        condition |= {key: text for key, text in (("reason", reason), ("message", message)) if text}
        others = [other for other in self.value["status"].get("conditions") or () if other["type"] != kind]
        self.value["status"]["conditions"] = [*others, condition]


def format_timestamp(time: datetime) -> str:
    """Return a time in the API's format with microseconds."""
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")
