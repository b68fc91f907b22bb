"""The environment of a training pod: what the operator's manifests set and the supervisor reads.

The ranks below the supervisor get torch's own names (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT) besides.
"""

from __future__ import annotations

RUN_SPEC = "FINETUNE_RUN_SPEC"
"""File that holds the RunSpec as JSON."""
ATTEMPT = "FINETUNE_ATTEMPT"
"""Number of the attempt that this pod belongs to, from 1."""
POD_NAME = "FINETUNE_POD_NAME"
POD_UID = "FINETUNE_POD_UID"
NODE_RANK = "FINETUNE_NODE_RANK"
"""Index of this pod in the gang, from 0."""
NUM_NODES = "FINETUNE_NUM_NODES"
PROCESSES_PER_NODE = "FINETUNE_PROCESSES_PER_NODE"
MASTER_ADDR = "MASTER_ADDR"
MASTER_PORT = "MASTER_PORT"
BACKEND = "FINETUNE_BACKEND"
"""torch.distributed backend: nccl, gloo or ccl."""
COORDINATOR_URL = "FINETUNE_COORDINATOR_URL"
"""Where beats are posted, e.g. https://coordinator.finetune-system.svc:8443. Empty: nobody to tell."""
COORDINATOR_TOKEN = "FINETUNE_COORDINATOR_TOKEN"  # noqa: S105  a file's name, not a secret
"""File that holds the bearer token of this pod; read anew for every beat, for tokens are rotated."""
COORDINATOR_CA = "FINETUNE_COORDINATOR_CA"
"""File with the certificate authority of the coordinator; empty for plain HTTP."""
BEAT_SECONDS = "FINETUNE_BEAT_SECONDS"
"""Longest time between two beats when nothing changes."""
GRACE_SECONDS = "FINETUNE_GRACE_SECONDS"
"""The pod's termination grace period: how long the ranks have after SIGTERM."""
HOLD_SECONDS = "FINETUNE_HOLD_SECONDS"
"""How long a supervisor whose ranks lost a peer goes on waiting for a new world while nobody answers it; 0: not at
all."""
STANDBY = "FINETUNE_STANDBY"
"""1: start no ranks; the pod waits for the operator to name a world that it belongs to."""
CHECKPOINT_DIR = "FINETUNE_CHECKPOINT_DIR"
"""Folder of this job on the shared storage: checkpoints, fence, validation pictures, outputs."""
BUCKET = "FINETUNE_BUCKET"
"""URL of this job's folder in an object store; where it is set, checkpoints go there, and what lies in CHECKPOINT_DIR
is a copy."""
SCRATCH_DIR = "FINETUNE_SCRATCH_DIR"
"""Folder of this job on the node's own disk; where it is set, checkpoints go there first."""
S3_ENDPOINT = "AWS_ENDPOINT_URL"
"""Address of the S3 server, as every client of S3 reads it."""
CACHE_DIR = "FINETUNE_CACHE_DIR"
"""Folder shared by all jobs for latents, embeddings and the hub's files."""
TERMINATION_LOG = "FINETUNE_TERMINATION_LOG"
"""File for the pod's last words (Kubernetes' terminationMessagePath)."""
REPORT_FD = "FINETUNE_REPORT_FD"
"""Set by the supervisor for each rank: the descriptor of the pipe that takes its reports."""
MTBF_SECONDS = "FINETUNE_MTBF_SECONDS"
"""Mean time between the job's interruptions, as far as the operator has seen: the interval `auto` follows from it."""
FORK_SERVER = "FINETUNE_FORK_SERVER"
"""Address of a fork server that the pods of one machine share; empty: each supervisor starts its own."""
MIN_PART_BYTES = "FINETUNE_MIN_PART_BYTES"
"""Smallest part of a checkpoint that a rank of its own writes; a state smaller than two of them is written by rank 0
alone."""
