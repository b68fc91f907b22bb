"""Options of one operator process. Created by `server.options`; `Settings` contain the options that affect jobs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from finetune_operator.cluster.kube.leader.lease import LeaseOptions


@dataclass(frozen=True)
class UpdateLimits:
    """Rate limits of heartbeats and of progress in the status."""

    seconds_per_job: float = 5.0
    """Minimum time between two writes of one job's progress."""
    writes_per_second: float = 20.0
    """Maximum rate of progress writes of all jobs."""
    beats_per_second: float = 500.0
    """Maximum rate of heartbeats of all pods: with more pods, the interval between heartbeats grows."""


@dataclass(frozen=True)
class CoordinatorOptions:
    """Address and certificates of the endpoint that receives heartbeats."""

    host: str = "0.0.0.0"  # noqa: S104  it serves pods of all nodes
    port: int = 8443
    max_connections: int = 10_000
    """Open connections; more are refused."""
    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None
    """Certificate authority to distribute to the supervisors; None: they get it in another way."""
    secret: str = ""
    """Secret in which the operator keeps its own authority and certificate, instead of these files."""
    hosts: tuple[str, ...] = ()
    """DNS names of the operator's own certificate."""
    namespace: str = ""
    service: str = ""
    """Service without a selector whose endpoint is the leading replica; empty: no endpoint is published."""
    address: str = ""
    """This replica's address in that service."""


@dataclass(frozen=True)
class OperatorOptions:
    """Options of this process."""

    identity: str
    kubeconfig: Path | None = None
    context: str | None = None
    namespaces: tuple[str, ...] = ()
    """Namespaces to watch; empty: all."""
    num_workers: int = 32
    lease: LeaseOptions | None = None
    """None: no leader election, this is the only replica."""
    coordinator: CoordinatorOptions | None = None
    """None: no heartbeats are received."""
    limits: UpdateLimits = field(default_factory=UpdateLimits)
    taint_after_jobs: int = 0
    """Number of jobs whose GPUs failed on a node, from which it is tainted; 0: never."""
