"""Pins: what the first attempt found of each input, in one file each, next to the job's checkpoints.

A pin is created once and never changes, whatever attempts run at the same time. So all attempts read the same one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_contract import paths
from finetune_contract.bucket import Bucket
from finetune_contract.identity import InputIdentity
from finetune_trainer.errors import StorageError
from finetune_trainer.files import write_atomically

_SUFFIX = ".json"


@dataclass(frozen=True)
class Pin:
    """An input as the first attempt found it.

    Attributes:
        identity: its identity.
        files: fingerprints of its files by name; empty if a commit identifies it.
        rows: short hashes of its samples; see `SampleIdentity`.
    """

    identity: InputIdentity
    files: Mapping[str, str] = field(default_factory=dict)
    rows: bytes = b""

    def to_json(self) -> bytes:
        """Return the pin as JSON."""
        document: dict[str, Any] = {"identity": self.identity.model_dump(by_alias=True, exclude_none=True)}
        if self.files:
            document["files"] = dict(self.files)
        if self.rows:
            document["rows"] = base64.b64encode(self.rows).decode()
        return json.dumps(document, indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Pin:
        """Return the pin of a JSON document.

        Raises:
            ValueError: it is not one.
        """
        try:
            document = json.loads(data)
            identity = InputIdentity.model_validate(document["identity"])
            return cls(identity, document.get("files", {}), base64.b64decode(document.get("rows", "")))
        except (ValidationError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(str(error)) from error


class PinStore:
    """The pins of one job.

    Args:
        job_dir: the job's folder on the pods' storage.
        bucket: the job's folder in an object store; the pins are there if it is set.
    """

    def __init__(self, job_dir: Path, bucket: Bucket | None) -> None:
        self._folder = job_dir / paths.INPUTS
        self._bucket = None if bucket is None else bucket.below(paths.INPUTS)

    def read_all(self) -> dict[str, Pin]:
        """Return all pins by name.

        Raises:
            StorageError: they cannot be read.
        """
        try:
            if self._bucket is not None:
                names = [name for name in self._bucket.names() if name.endswith(_SUFFIX)]
                found = {name: self._bucket.read(name) for name in names}
            else:
                files = sorted(self._folder.glob(f"[!.]*{_SUFFIX}"))
                found = {path.name: path.read_bytes() for path in files}
        except OSError as error:
            raise StorageError(f"checkpoint storage: {self._folder} cannot be read: {error}") from error
        pins = {}
        for name, data in found.items():
            # An unreadable pin does not stop the job: each checkpoint holds the identities, too.
            with contextlib.suppress(ValueError):
                pins[name.removesuffix(_SUFFIX)] = Pin.from_json(data)
        return pins

    def create(self, name: str, pin: Pin) -> bool:
        """Write a pin durably unless one of this name exists; return whether it was written.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            if self._bucket is not None:
                return self._bucket.put_new(f"{name}{_SUFFIX}", pin.to_json())
            return self._create_file(self._folder / f"{name}{_SUFFIX}", pin.to_json())
        except OSError as error:
            raise StorageError(f"checkpoint storage: {self._folder}/{name} cannot be written: {error}") from error

    @staticmethod
    def _create_file(path: Path, data: bytes) -> bool:
        """Create a complete file: a hard link fails if the name exists, on network storage, too."""
        if path.exists():
            return False
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        write_atomically(temporary, data)
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError:
            # Some file systems have no hard links.
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return True
