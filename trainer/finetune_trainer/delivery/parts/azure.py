"""Uploads to Azure Blob Storage: blocks are stored uncommitted, and one request makes the blob of them.

The id of a block contains the MD5 of its contents, so a listing shows what it holds. The service deletes uncommitted
blocks after a week; no request can delete those of a blob that does not exist.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Coroutine, Mapping
from typing import Any

from finetune_contract.bucket import Bucket
from finetune_trainer.delivery.parts.base import SHA256, PendingUpload, UploadPart

_WRITE = "cannot be written"


class AzureParts:
    """Uncommitted blocks of blobs below a folder; see `PartStore`. The handle is the SHA-256 of the contents."""

    max_parts = 50_000

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._container, _, self._root = bucket.root.partition("/")

    def probe(self) -> None:
        """Store an uncommitted block of a blob that is never made: it needs the permission to write."""
        data = b"probe"
        upload = self.begin(f".probe-{secrets.token_hex(8)}", "")
        self.put(upload, UploadPart(1, 0, len(data)), data)

    def sha256_of(self, name: str) -> tuple[int, str] | None:
        """Return size and SHA-256 by the metadata of the blob."""
        from azure.core.exceptions import ResourceNotFoundError  # noqa: PLC0415  only az:// needs it

        async def read() -> tuple[int, str] | None:
            async with self._blob(name) as blob:
                try:
                    about = await blob.get_blob_properties()
                except ResourceNotFoundError:
                    return None
                return int(about.size), str((about.metadata or {}).get(SHA256, ""))

        found: tuple[int, str] | None = self._run("cannot be read", read())
        return found

    def find(self, name: str, sha256: str) -> list[PendingUpload]:
        """List the uncommitted blocks."""
        from azure.core.exceptions import ResourceNotFoundError  # noqa: PLC0415

        async def read() -> list[str]:
            async with self._blob(name) as blob:
                try:
                    _, uncommitted = await blob.get_block_list("uncommitted")
                except ResourceNotFoundError:
                    return []
                return [str(block.id) for block in uncommitted]

        parts = dict(_read_id(each) for each in self._run("cannot be listed", read()))
        return [PendingUpload(name, sha256, parts)] if parts else []

    def begin(self, name: str, sha256: str) -> PendingUpload:
        """Return an upload without blocks; nothing is written."""
        return PendingUpload(name, sha256, {})

    def put(self, upload: PendingUpload, part: UploadPart, data: bytes) -> str:
        """Store a block; the service compares its MD5."""
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()

        async def write() -> None:
            async with self._blob(upload.name) as blob:
                await blob.stage_block(block_id(part.number, md5), data, length=len(data), validate_content=True)

        self._run(_WRITE, write())
        return md5

    def commit(self, upload: PendingUpload, parts: Mapping[int, str]) -> None:
        """Commit the list of blocks; the service discards all other blocks of the blob."""
        from azure.storage.blob import BlobBlock  # noqa: PLC0415

        blocks = [BlobBlock(block_id(number, parts[number])) for number in sorted(parts)]

        async def write() -> None:
            async with self._blob(upload.name) as blob:
                await blob.commit_block_list(blocks, metadata={SHA256: upload.handle})

        self._run(_WRITE, write())

    def abort(self, upload: PendingUpload) -> None:
        """Do nothing: the commit discards the blocks, or the service does after a week."""

    def _blob(self, name: str) -> Any:
        path = f"{self._root}/{name}" if self._root else name
        return self._bucket.client.service_client.get_blob_client(self._container, path)

    def _run(self, what: str, request: Coroutine[Any, Any, Any]) -> Any:
        from fsspec.asyn import sync  # noqa: PLC0415

        with self._bucket.translating_errors(what):
            return sync(self._bucket.client.loop, lambda: request)


def block_id(number: int, md5: str) -> str:
    """Return the id of a block; all ids of a blob have the same length."""
    return base64.b64encode(f"{number:06d}-{md5}".encode()).decode()


def _read_id(text: str) -> tuple[int, str]:
    """Return the number and the MD5 in an id; number 0 for an id of another program."""
    decoded = text if "-" in text else base64.b64decode(text).decode(errors="replace")
    number, _, md5 = decoded.partition("-")
    return (int(number), md5) if number.isdigit() else (0, "")
