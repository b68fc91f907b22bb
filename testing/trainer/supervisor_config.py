"""A supervisor's configuration without a coordinator, for code that starts ranks itself."""

from __future__ import annotations

from finetune_trainer.supervisor.config import Config


def make_config(node_rank: int = 0, num_nodes: int = 1) -> Config:
    """Return the configuration of one pod with one rank."""
    return Config(
        namespace="default",
        job="circles",
        job_uid="uid",
        pod=f"circles-a1-n{node_rank}",
        pod_uid="pod-uid",
        attempt=1,
        node_rank=node_rank,
        num_nodes=num_nodes,
        processes_per_node=1,
        coordinator_url="",
        coordinator_token=None,
        coordinator_ca=None,
        beat_seconds=1.0,
        termination_log=None,
        master_addr="127.0.0.1",
    )
