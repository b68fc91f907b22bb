"""Plain data of the simulation: pods, nodes, the jobs' folders on shared storage, and the interface of the watchdog."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from finetune_contract.outputs.request import ExportResult
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.types import ObservedPod

SHORT_SECONDS = 0.25
"""Longest duration of a step or a save of a training that only has to end."""


@dataclass
class SimulatedPod:
    """The real state of a pod, and the state that the API server reports."""

    job: str
    observed: ObservedPod
    """The state that the API server reports."""
    grace_seconds: int
    num_nodes: int = 1
    """Number of pods of its gang, according to its manifest."""
    avoid: frozenset[str] = frozenset()
    """Names of nodes that it uses only if no others are free."""
    spot_only: bool = False
    """Whether it accepts spot nodes only."""
    is_standby: bool = False
    """Whether its manifest gives it no rank yet."""
    must_join: bool = False
    """Whether its manifest does not contain the address of rank 0."""
    export_result: ExportResult | None = None
    """Termination message of an export pod."""
    group: str = ""
    """Name of its PodGroup; empty: the scheduler places it by itself."""
    node: SimulatedNode | None = None
    running: bool = False
    """Whether its processes run, independent of the state that the API server reports."""
    end: Callable[[int], None] = field(default=lambda _: None)
    """Ends its processes at once with an exit code. -1: its node has stopped; -2: the same, and its peers notice."""
    notice: Callable[[], None] = field(default=lambda: None)
    """Sends SIGTERM; set by the processes in the pod."""


class BrokenInvariantError(AssertionError):
    """The plan, or the simulation around it, has violated an invariant."""


class Watchdog(Protocol):
    """Receives every fact that an invariant is about, before anything else happens."""

    def status_written(self, job: FineTuneJob, new: FineTuneJobStatus) -> None:
        """Handle a status that the operator wrote over that of `job`."""
        ...

    def pod_created(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """Handle the creation of a pod."""
        ...

    def pod_deleted(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """Handle the operator's request to delete a pod."""
        ...

    def pod_resized(self, job: FineTuneJob, pod: ObservedPod, memory: str) -> None:
        """Handle the operator's request to change the memory of a running pod."""
        ...

    def quota_released(self, job_name: str) -> None:
        """Handle the release of a job's quota in its queue by the operator."""
        ...

    def committed(self, job_name: str, attempt: int, step: int) -> None:
        """Handle a checkpoint that a gang committed."""
        ...


@dataclass(frozen=True)
class Workload:
    """The durations and abilities of a job's trainers."""

    total_steps: int = 200
    step_seconds: float = 1.0
    save_steps: int = 50
    save_seconds: float = 2.0
    load_seconds: float = 10.0
    restore_seconds: float = 2.0
    export_seconds: float = 5.0
    stall_seconds: float | None = None
    """Time for which an asynchronous save stops the training; None: for the complete save."""
    warm_load_seconds: float | None = None
    """Loading time in a pod that has loaded before; None: the same as the first time."""
    full_size: int | None = None
    """Number of nodes for which `step_seconds` is valid; fewer take longer in proportion. None: it has no effect."""
    emergency_saves: bool = False
    """Whether survivors save the last finished step when a peer fails suddenly."""
    saves_on_notice: bool = True
    """False: SIGTERM ends a rank without a save, as in most training scripts."""

    def faster(self) -> Workload:
        """Return the same training with short steps and saves."""
        return replace(
            self, step_seconds=min(self.step_seconds, SHORT_SECONDS), save_seconds=min(self.save_seconds, SHORT_SECONDS)
        )


@dataclass
class SimulatedStorage:
    """A job's folder on shared storage, atomic like the real one: a commit checks the fence."""

    workload: Workload
    fence: int = 0
    """Newest attempt that has marked it."""
    step: int = 0
    """Step of the newest checkpoint; 0: none."""
    attempt: int = 0
    """Attempt that wrote it."""
    num_trained: int = 0
    """Steps finished in total, including repeated ones."""

    def mark(self, attempt: int) -> bool:
        """Record the begin of an attempt; return False if a newer one has begun."""
        self.fence = max(self.fence, attempt)
        return attempt == self.fence

    def commit(self, attempt: int, step: int) -> bool:
        """Store a checkpoint; return False if a newer attempt has begun."""
        if attempt < self.fence:
            return False
        self.step, self.attempt = step, attempt
        return True


@dataclass
class SimulatedNode:
    """A node with room for one pod."""

    name: str
    up: bool = True
    """Whether its processes run."""
    connected: bool = True
    """Whether it reaches the control plane and the operator; its pods reach each other in any case."""
    exists: bool = True
    """Whether the API server still has its Node."""
    lost: bool = False
    """Whether the control plane has noticed that it is silent."""
    leaving: str = ""
    """Taint of a termination handler."""
    spot: bool = True
    refuses: bool = False
    """Whether its kubelet refuses every pod, as with an unhealthy device."""
    skew_seconds: float = 0.0
    """Error of its clock."""
    pods: set[str] = field(default_factory=set)
    """Names of the pods that are bound to it."""
    has_image: bool = False
    started: list[SimulatedPod] = field(default_factory=list)
    """Pods whose processes were started here."""
