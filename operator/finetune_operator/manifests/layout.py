"""Where things lie inside a training pod."""

from __future__ import annotations

STORAGE = "/finetune/storage"
CACHE = "/finetune/cache"
CACHE_ON_STORAGE = f"{STORAGE}/.cache"
"""The jobs' folders on the storage begin with a namespace, which never begins with a dot."""
RUN = "/finetune/run"
RUN_SPEC_KEY = "run.json"
TOKEN = "/finetune/token"  # noqa: S105  a folder, not a secret
TOKEN_FILE = "token"  # noqa: S105
CA_FILE = "ca.crt"
SHARED_MEMORY = "/dev/shm"  # noqa: S108  the folder that POSIX shared memory is bound to
SCRATCH = "/tmp"  # noqa: S108  an emptyDir of the pod
NODE_DISK = "/finetune/scratch"
"""An emptyDir for checkpoints on their way to the storage."""
TERMINATION_LOG = "/dev/termination-log"
"""Kubernetes' default: it is there even under a read-only root file system."""
