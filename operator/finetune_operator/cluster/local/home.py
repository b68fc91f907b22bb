"""Where the local cluster keeps what: the layout of the state folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_operator.cluster.key import JobKey

HOME_VARIABLE = "FINETUNE_HOME"
CACHE_CLAIM = "finetune-cache"
"""Claim of the cache that all jobs share."""


@dataclass(frozen=True)
class JobFolder:
    """One job's part of the state folder."""

    path: Path

    @property
    def job(self) -> Path:
        """The FineTuneJob."""
        return self.path / "job.json"

    @property
    def events(self) -> Path:
        """What a person was told."""
        return self.path / "events.json"

    @property
    def lock(self) -> Path:
        """Held by the `finetune run` that drives the job."""
        return self.path / "lock"

    @property
    def endpoint(self) -> Path:
        """Port of the coordinator, and the gang's rendezvous ports by attempt."""
        return self.path / "endpoint.json"

    @property
    def pods(self) -> Path:
        """One folder for each pod."""
        return self.path / "pods"

    @property
    def logs(self) -> Path:
        """One file for each pod; they outlive the pods."""
        return self.path / "logs"

    def objects(self, kind: str) -> Path:
        """Folder of ConfigMaps or Services."""
        return self.path / f"{kind.lower()}s"


@dataclass(frozen=True)
class Home:
    """The state folder."""

    path: Path

    @property
    def storage(self) -> Path:
        """Stands for the storage that all pods share: checkpoints and outputs, unless a job names its own."""
        return self.path / "storage"

    def claim(self, name: str) -> Path:
        """Folder that stands for a PersistentVolumeClaim; the cache's has a place where people look for it."""
        return self.path / "cache" if name == CACHE_CLAIM else self.path / "volumes" / name

    def job(self, key: JobKey) -> JobFolder:
        """Folder of a job, whether it exists or not."""
        return JobFolder(self.path / "jobs" / key.namespace / key.name)

    def jobs(self) -> Iterator[JobKey]:
        """Jobs that have a folder, by name."""
        for folder in sorted((self.path / "jobs").glob("*/*")):
            if folder.is_dir():
                yield JobKey(folder.parent.name, folder.name)


def default_home(env: Mapping[str, str] = os.environ) -> Path:
    """$FINETUNE_HOME, else the XDG state folder."""
    if chosen := env.get(HOME_VARIABLE):
        return Path(chosen).expanduser().absolute()
    state = env.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser().absolute() / "finetune"
