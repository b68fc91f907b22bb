"""Uploads to Google Cloud Storage: parts are objects in a hidden folder, of which one request composes the object."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import secrets
from collections.abc import Mapping

from finetune_contract.bucket import Bucket
from finetune_trainer.delivery.parts.base import SHA256, PendingUpload, UploadPart

_WRITE = "cannot be written"
PARTS = ".finetune-parts"
"""Folder of the parts, below the target."""


class GcsParts:
    """Parts and compositions below a folder; see `PartStore`. The handle is the folder of the parts."""

    max_parts = 32
    """One request composes at most 32 objects."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def probe(self) -> None:
        """Write an object below the folder of the parts, and remove it."""
        name = f"{PARTS}/probe-{secrets.token_hex(8)}"
        self._bucket.put(name, b"probe")
        self._bucket.remove([name])

    def sha256_of(self, name: str) -> tuple[int, str] | None:
        """Return size and SHA-256 by the metadata of the object."""
        try:
            with self._bucket.translating_errors("cannot be read"):
                about = self._bucket.client.info(self._path(name))
        except FileNotFoundError:
            return None
        return int(about["size"]), str((about.get("metadata") or {}).get(SHA256, ""))

    def find(self, name: str, sha256: str) -> list[PendingUpload]:
        """Return the parts that exist, with the MD5 that the store has computed."""
        upload = self._upload(name, sha256)
        with self._bucket.translating_errors("cannot be listed"):
            listed = self._bucket.client.find(self._path(upload.handle), detail=True)
        parts = {
            int(path.rpartition("/")[2]): base64.b64decode(about["md5Hash"]).hex()
            for path, about in listed.items()
            if about.get("md5Hash") and path.rpartition("/")[2].isdigit()
        }
        return [PendingUpload(name, upload.handle, parts)] if parts else []

    def begin(self, name: str, sha256: str) -> PendingUpload:
        """Return an upload without parts; nothing is written."""
        return self._upload(name, sha256)

    def put(self, upload: PendingUpload, part: UploadPart, data: bytes) -> str:
        """Store a part as an object, and compare the MD5 that the store has computed."""
        path = self._path(f"{upload.handle}/{part.number:05d}")
        md5 = hashlib.md5(data, usedforsecurity=False)
        with self._bucket.translating_errors(_WRITE):
            self._bucket.client.pipe_file(path, data)
            found = self._bucket.client.info(path).get("md5Hash")
            if found is not None and base64.b64decode(found) != md5.digest():
                # An outage: the part is sent again.
                raise ConnectionAbortedError(f"part {part.number} of {upload.name} was damaged on its way")
        return md5.hexdigest()

    def commit(self, upload: PendingUpload, parts: Mapping[int, str]) -> None:
        """Compose the object, set its metadata, and remove the parts."""
        sources = [self._path(f"{upload.handle}/{number:05d}") for number in sorted(parts)]
        with self._bucket.translating_errors(_WRITE):
            self._bucket.client.merge(self._path(upload.name), sources)
            self._bucket.client.setxattrs(self._path(upload.name), **{SHA256: upload.handle.rpartition("/")[2]})
        self.abort(upload)

    def abort(self, upload: PendingUpload) -> None:
        """Remove the parts."""
        with self._bucket.translating_errors("cannot be cleaned up"), contextlib.suppress(FileNotFoundError):
            found = self._bucket.client.find(self._path(upload.handle))
            if found:
                self._bucket.client.rm(found)

    def _upload(self, name: str, sha256: str) -> PendingUpload:
        of_name = hashlib.sha256(name.encode()).hexdigest()[:12]
        return PendingUpload(name, f"{PARTS}/{of_name}/{sha256}", {})

    def _path(self, name: str) -> str:
        return f"{self._bucket.root}/{name}"
