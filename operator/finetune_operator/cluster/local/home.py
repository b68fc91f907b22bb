"""The layout of the state folder of the local cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_operator.cluster.key import JobKey

HOME_VARIABLE = "FINETUNE_HOME"
CACHE_CLAIM = "finetune-cache"
"""Name of the claim for the cache that all jobs share."""


@dataclass(frozen=True)
class JobFolder:
    """One job's part of the state folder."""

    path: Path

    @property
    def job(self) -> Path:
        """File of the FineTuneJob."""
        return self.path / "job.json"

    @property
    def events(self) -> Path:
        """File of the job's events."""
        return self.path / "events.json"

    @property
    def lock(self) -> Path:
        """File that the `finetune run` of the job locks."""
        return self.path / "lock"

    @property
    def endpoint(self) -> Path:
        """File with the coordinator's port and the gang's rendezvous ports by attempt."""
        return self.path / "endpoint.json"

    @property
    def pods(self) -> Path:
        """Folder with one folder per pod."""
        return self.path / "pods"

    @property
    def logs(self) -> Path:
        """Folder with one log file per pod. Logs remain after the deletion of their pods."""
        return self.path / "logs"

    @property
    def configs(self) -> Path:
        """Folder with one file per ConfigMap."""
        return self.path / "configmaps"


@dataclass(frozen=True)
class Home:
    """The state folder."""

    path: Path

    @property
    def storage(self) -> Path:
        """Folder that replaces the shared storage: checkpoints and outputs of all jobs that name no other storage."""
        return self.path / "storage"

    def claim(self, name: str) -> Path:
        """Return the folder that replaces a PersistentVolumeClaim. The cache has a folder that users find easily."""
        return self.path / "cache" if name == CACHE_CLAIM else self.path / "volumes" / name

    def job(self, key: JobKey) -> JobFolder:
        """Return the folder of a job. It may not exist."""
        return JobFolder(self.path / "jobs" / key.namespace / key.name)

    def jobs(self) -> Iterator[JobKey]:
        """Yield the keys of the jobs that have a folder, sorted by name."""
        for folder in sorted((self.path / "jobs").glob("*/*")):
            if folder.is_dir():
                yield JobKey(folder.parent.name, folder.name)


def default_home(env: Mapping[str, str] = os.environ) -> Path:
    """Return $FINETUNE_HOME if it is set, else a folder in the XDG state folder."""
    if chosen := env.get(HOME_VARIABLE):
        return Path(chosen).expanduser().absolute()
    state = env.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser().absolute() / "finetune"
