"""Options that an administrator sets for all jobs. Plain data; `plan` and `manifests` receive it as a parameter."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_contract import __version__

REGISTRY = "ghcr.io/finetune-operator"
"""Registry of the released images."""


@dataclass(frozen=True)
class Settings:
    """Settings of the operator, or of the local cluster."""

    trainer_image_gpu: str = f"{REGISTRY}/trainer-cuda:{__version__}"
    trainer_image_cpu: str = f"{REGISTRY}/trainer-cpu:{__version__}"
    trainer_image_cpu_intel: str = f"{REGISTRY}/trainer-cpu-intel:{__version__}"
    """Image of CPU jobs that request oneCCL or IPEX."""
    trainer_image_export: str = f"{REGISTRY}/trainer-export:{__version__}"
    """Image of the pods that write outputs with the packages of the extra `export`; empty: no job can request them."""
    export_command: tuple[str, ...] = ("python", "-m", "finetune_trainer.export_pod")
    trainer_command: tuple[str, ...] = ("finetune-supervisor",)
    coordinator_url: str = ""
    """URL to which supervisors send heartbeats; empty: they send none."""
    coordinator_ca_config: str = ""
    """ConfigMap whose key ca.crt contains the coordinator's certificate authority; empty for plain HTTP."""
    coordinator_ca_in_run: bool = False
    """Whether each job's own ConfigMap contains that authority; the operator keeps it up to date."""
    coordinator_audience: str = "finetune-coordinator"
    """Audience of the pods' tokens."""
    token_seconds: int = 3600
    """Lifetime of a pod's token."""
    rendezvous_port: int = 29500
    """Port of rank 0's rendezvous store in the pod network."""
    beat_seconds: float = 5.0
    """Maximum time between two heartbeats of a supervisor."""
    standstill_seconds: float = 3600.0
    """Time limit without progress while loading, caching or saving; recovery.hangTimeout applies to steps."""
    beat_timeout_seconds: float = 60.0
    """A pod that has sent heartbeats and then none for this long is reported as silent."""
    max_attempts_kept: int = 20
    """Maximum length of the ledger in the status."""
    require_storage: bool = True
    """Refuse a job without spec.checkpoint.storage. Local runs use their own folder."""
    outputs_on_volumes: bool = True
    """Refuse outputs that a pod cannot write or that are lost with it. A local run writes to this machine's folders."""
    cache_claim: str = ""
    """Claim with this name in every namespace for the shared cache; empty: a folder on the job's own storage."""
    cores_per_rank: int = 1
    """CPU cores requested for each rank of a pod if topology.resources has no cpu; 0: none."""
    trainer_user_id: int = 1000
    """User and group of the trainer; also the group that owns its volumes."""
    failure_backoff_seconds: float = 10.0
    """Delay of the attempt after a first failure; it doubles with each further failure."""
    failure_backoff_max_seconds: float = 300.0
    """Maximum of that delay."""
    same_step_failures: int = 3
    """Number of failures in a row at the same step that end a job, even if recovery.maxFailures allows more."""
    hold_seconds: float = 120.0
    """Time that a supervisor whose ranks lost a peer waits for a new world while it gets no reply; 0: pods of an ended
    attempt are never kept."""
    regroup_seconds: float = 60.0
    """Minimum training time before an attempt is interrupted for better capacity (more nodes, or spot nodes), which
    costs some seconds each time; also the minimum of remaining training time."""
    quota_hold_seconds: float = 300.0
    """Time after which the pods of a gang are deleted if the cluster refuses its other pods; 0: never."""
    cause_seconds: float = 10.0
    """Time to wait for the cause of a failure that is only a consequence (a lost peer)."""
    kueue: bool = False
    """Whether jobs may request queues of Kueue."""
    kueue_priority_boost: bool = False
    """Whether Workloads contain the cost of their eviction, for Kueue's feature gate PriorityBoost."""
    kueue_topology: bool = False
    """Whether Workloads of packed jobs request their domain from Kueue: the flavors have topologies."""
    resize_pods: bool = False
    """Whether running pods get more memory in place after another pod of their gang exceeded its memory."""
    user_namespaces: bool = False
    """Whether pods run in user namespaces of their own."""
    rack_label: str = ""
    """Label of nodes whose value is their rack; empty: no job can request a rack."""
    gangs: bool = False
    """Whether jobs may request that their pods receive nodes together."""
    disruption_budgets: bool = False
    """Whether running gangs have a PodDisruptionBudget."""
    eviction_requests: bool = False
    """Whether the operator responds to Kubernetes' eviction requests."""
    gang_hold_seconds: float = 60.0
    """Longest time for which the pods of an incomplete gang hold nodes."""
    peer_grace_seconds: int = 2
    """Grace period of pods that cannot finish a step because a pod of their gang is lost."""
