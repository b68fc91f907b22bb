"""The things of the simulated world, as plain data: jobs' folders on the storage, nodes, and the law of the land."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from finetune_operator.api.job import FineTuneJob, FineTuneJobStatus
from finetune_operator.plan.model.types import ObservedPod


@dataclass
class SimPod:
    """A pod as it really is, and what the API says of it."""

    job: str
    seen: ObservedPod
    grace_seconds: int
    num_nodes: int = 1
    """Pods of its gang, as its manifest says."""
    spot_only: bool = False
    """Whether it goes to no other nodes than spot."""
    stands_by: bool = False
    """Whether its manifest gives it no rank yet."""
    node: Node | None = None
    running: bool = False
    """Whether its processes live, whatever the API says."""
    end: Callable[[int], None] = field(default=lambda _: None)
    """Ends its processes at once with an exit code. -1: its machine has stopped; -2: and its peers saw that."""
    notice: Callable[[], None] = field(default=lambda: None)
    """SIGTERM; set by what runs in it."""


class BrokenInvariantError(AssertionError):
    """The core, or the simulation of what is around it, has done what must never happen."""


class Watchdog(Protocol):
    """Told of everything that an invariant speaks of, before anything else happens."""

    def status_written(self, job: FineTuneJob, new: FineTuneJobStatus) -> None:
        """The operator wrote a status over that of `job`."""
        ...

    def pod_created(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """A pod came into being."""
        ...

    def pod_deleted(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """The operator asked for the end of a pod."""
        ...

    def committed(self, job_name: str, attempt: int, step: int) -> None:
        """A gang committed a checkpoint."""
        ...


@dataclass(frozen=True)
class Workload:
    """What a job's trainers are like."""

    total_steps: int = 200
    step_seconds: float = 1.0
    save_steps: int = 50
    save_seconds: float = 2.0
    load_seconds: float = 10.0
    restore_seconds: float = 2.0
    export_seconds: float = 5.0
    stall_seconds: float | None = None
    """For how long a save holds up the steps, where it goes on beside them; None: all the time."""
    warm_load_seconds: float | None = None
    """Loading again in a pod that has loaded before; None: as long as at first."""
    full_size: int | None = None
    """Nodes that a step of `step_seconds` is done by; fewer take longer in proportion. None: it does not matter."""
    rescues: bool = False
    """Whether survivors save the last finished step when a peer dies suddenly."""
    saves_on_notice: bool = True
    """False: SIGTERM just ends a rank, as it does with most training scripts."""


@dataclass
class Storage:
    """A job's folder on shared storage, atomic as the real one: the fence is looked at within the commit."""

    workload: Workload
    fence: int = 0
    """Newest attempt that has marked it."""
    step: int = 0
    """Steps of the newest checkpoint; 0: none."""
    attempt: int = 0
    """Attempt that wrote it."""
    num_trained: int = 0
    """Steps finished in all, those done again included."""

    def mark(self, attempt: int) -> bool:
        """Say that an attempt has begun; False where a newer one has."""
        self.fence = max(self.fence, attempt)
        return attempt == self.fence

    def commit(self, attempt: int, step: int) -> bool:
        """Keep a checkpoint; False where a newer attempt has begun."""
        if attempt < self.fence:
            return False
        self.step, self.attempt = step, attempt
        return True


@dataclass
class Node:
    """A machine with room for one pod."""

    name: str
    up: bool = True
    """Whether its processes run and are connected."""
    connected: bool = True
    """Whether the control plane and the operator are within reach; its pods reach each other in any case."""
    exists: bool = True
    """Whether the API still shows it."""
    lost: bool = False
    """Whether the control plane has noticed that it is silent."""
    leaving: str = ""
    """Taint of a termination handler."""
    spot: bool = True
    skew_seconds: float = 0.0
    """How far its clock is off."""
    pods: set[str] = field(default_factory=set)
    """Names of the pods that are bound to it."""
    has_image: bool = False
    started: list[SimPod] = field(default_factory=list)
    """Pods whose processes were started here."""
