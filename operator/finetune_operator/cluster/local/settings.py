"""The operator's settings for a run on one machine. On a cluster, an administrator chooses them."""

from __future__ import annotations

from finetune_operator.cluster.local.home import CACHE_CLAIM
from finetune_operator.settings import Settings

LOCAL = Settings(
    beat_seconds=0.5,
    require_storage=False,
    outputs_on_volumes=False,
    cache_claim=CACHE_CLAIM,
    failure_backoff_seconds=1.0,
    failure_backoff_max_seconds=60.0,
    cause_seconds=3.0,
    regroup_seconds=1.0,
    # Pods without a cpu request share the machine's cores evenly.
    cores_per_rank=0,
    # All pods run on this machine, and so in one rack.
    rack_label="kubernetes.io/hostname",
)
"""Shorter delays than on a cluster: there is no network, and a user is watching."""
