"""What an administrator decides for all jobs. Plain data, handed to `plan` and `build`; never read from inside them."""

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
    trainer_command: tuple[str, ...] = ("finetune-supervisor",)
    coordinator_url: str = ""
    """Where supervisors post their beats; empty: nowhere."""
    coordinator_ca_config: str = ""
    """ConfigMap with the key ca.crt of the coordinator's certificate authority; empty for plain HTTP."""
    coordinator_ca_in_run: bool = False
    """That authority comes to the pods in each job's own ConfigMap; the operator keeps it up to date there."""
    coordinator_audience: str = "finetune-coordinator"
    """Audience that the pods' tokens are bound to."""
    token_seconds: int = 3600
    """Life of a pod's token before it is rotated."""
    rendezvous_port: int = 29500
    """Port of rank 0's rendezvous store inside the pod network."""
    beat_seconds: float = 5.0
    """Longest time between two beats of a supervisor."""
    standstill_seconds: float = 3600.0
    """Loading, caching, saving and the like may show nothing new for so long; recovery.hangTimeout is for steps."""
    beat_timeout_seconds: float = 60.0
    """A pod whose beats stay away so long, after the first, is shown as silent."""
    max_attempts_kept: int = 20
    """Length of the ledger in the status."""
    require_storage: bool = True
    """Refuse a job without spec.checkpoint.storage. Local runs have a folder of their own for it."""
    cache_claim: str = ""
    """Claim, of this name in every namespace, for what all jobs share; empty: a folder on the job's own storage."""
    cores_per_rank: int = 1
    """Cores that a pod asks for, for each of its ranks, where topology.resources has no cpu; 0: none."""
    trainer_user_id: int = 1000
    """User and group that the trainer runs as and that volumes are given to."""
    failure_backoff_seconds: float = 10.0
    """Wait before the attempt that follows a first failure; it doubles with every further one."""
    failure_backoff_max_seconds: float = 300.0
    """Longest such wait."""
    same_step_failures: int = 3
    """So many failures in a row at the same step end a job, whatever recovery.maxFailures still allows."""
    hold_seconds: float = 120.0
    """How long a supervisor whose ranks lost a peer goes on waiting for a new world while nobody answers it; 0: pods of
    an attempt that has ended are never kept."""
    regroup_seconds: float = 60.0
    """An attempt trains so long before it is interrupted for better capacity (more nodes, or spot ones again), which
    costs some seconds each time; and so much must at least be left to do."""
    cause_seconds: float = 10.0
    """How long a sign that is a mere consequence (a lost peer) waits for its cause to show."""
    peer_grace_seconds: int = 2
    """Grace period of pods that can no longer finish a step, because one of their gang is gone."""
