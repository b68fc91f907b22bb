"""Paths inside a training pod."""

from __future__ import annotations

STORAGE = "/finetune/storage"
CACHE = "/finetune/cache"
CACHE_ON_STORAGE = f"{STORAGE}/.cache"
"""It cannot collide with the jobs' folders: their paths begin with a namespace, which has no leading dot."""
RUN = "/finetune/run"
RUN_SPEC_KEY = "run.json"
TOKEN = "/finetune/token"  # noqa: S105  a folder, not a secret
TOKEN_FILE = "token"  # noqa: S105
CA_FILE = "ca.crt"
SHARED_MEMORY = "/dev/shm"  # noqa: S108  the mount point of POSIX shared memory
SCRATCH = "/tmp"  # noqa: S108  an emptyDir of the pod
MODEL = "/finetune/model"
"""The image of `model.image`."""
SCRIPT = "/finetune/script"
"""The ConfigMap with the script of a job."""
OUTPUT_SECRETS = "/finetune/output-secrets"
"""A folder for each Secret of an output."""
NODE_DISK = "/finetune/scratch"
"""An emptyDir for checkpoints before they are copied to the storage."""
TERMINATION_LOG = "/dev/termination-log"
"""Kubernetes' default; it exists even with a read-only root file system."""
