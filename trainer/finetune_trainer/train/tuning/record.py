"""Choices of the first attempt in the job's folder, so that later attempts compute with the same kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_trainer import patience
from finetune_trainer.checkpoint.store.select import JobFolders
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import StorageError
from finetune_trainer.files import write_atomically


@dataclass(frozen=True)
class KeptChoice:
    """One choice, as JSON in a file.

    Attributes:
        folders: the job's folders; the file is in the object store if the job has one.
        name: name of the file.
        world: the ranks; rank 0 reads, chooses and writes for all.
    """

    folders: JobFolders
    name: str
    world: World

    def get(self, choose: Callable[[], Any]) -> Any:
        """Return the choice of the first attempt on every rank; `choose` makes it. All ranks call this.

        Raises:
            StorageError: the choice cannot be stored.
        """
        chosen = None
        if self.world.is_first and (chosen := self.read()) is None:
            chosen = choose()
            self._write(chosen)
        return self.world.share(chosen)

    def read(self) -> Any:
        """Return the stored choice; None if there is none. A damaged file is replaced."""
        bucket, path = self.folders.bucket, self.folders.job_dir / self.name
        if bucket is not None:
            if not patience.wait_out("checkpoint storage: reading", lambda: bucket.exists(self.name)):
                return None
            data = patience.wait_out("checkpoint storage: reading", lambda: bucket.read(self.name))
        elif path.is_file():
            data = path.read_bytes()
        else:
            return None
        try:
            return json.loads(data)
        except ValueError:
            return None

    def _write(self, choice: Any) -> None:
        data, bucket = json.dumps(choice).encode(), self.folders.bucket
        try:
            if bucket is not None:
                patience.wait_out("checkpoint storage: writing", lambda: bucket.put(self.name, data))
            else:
                write_atomically(self.folders.job_dir / self.name, data)
        except OSError as error:
            raise StorageError(f"checkpoint storage: cannot write {self.name}: {error}") from error
