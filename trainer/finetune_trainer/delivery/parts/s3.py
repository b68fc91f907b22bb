"""Uploads to S3: multipart uploads, whose parts no reader sees before the upload is completed."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import secrets
from collections.abc import Mapping
from typing import Any

from finetune_contract.bucket import Bucket
from finetune_trainer.delivery.parts.base import SHA256, PendingUpload, UploadPart

_WRITE = "cannot be written"
_SIGNED = ("v4", "s3v4")
"""Versions of signatures that contain a hash of the contents."""


class S3Parts:
    """Multipart uploads below a folder; see `PartStore`."""

    max_parts = 10_000

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._name, _, self._root = bucket.root.partition("/")

    def probe(self) -> None:
        """Begin an upload, store one part and abort it: this needs the permissions of an upload, and leaves nothing."""
        upload = self.begin(f".probe-{secrets.token_hex(8)}", "")
        data = b"probe"
        try:
            self.put(upload, UploadPart(1, 0, len(data)), data)
        finally:
            self.abort(upload)

    def sha256_of(self, name: str) -> tuple[int, str] | None:
        """Return size and SHA-256 by the metadata of the object."""
        try:
            with self._bucket.translating_errors("cannot be read"):
                about = self._call("head_object", Key=self._key(name))
        except FileNotFoundError:
            return None
        return int(about["ContentLength"]), str(about.get("Metadata", {}).get(SHA256, ""))

    def find(self, name: str, sha256: str) -> list[PendingUpload]:
        """List the multipart uploads of the object and their parts; the ETag of a part is its MD5."""
        del sha256
        key = self._key(name)
        with self._bucket.translating_errors("cannot be listed"):
            # Of many uploads of one object, the first 1,000 suffice: the next call finds the others.
            listed = self._call("list_multipart_uploads", Prefix=key).get("Uploads") or []
        uploads = sorted((one for one in listed if one["Key"] == key), key=lambda one: str(one["Initiated"]))
        found = (self._with_parts(name, one["UploadId"]) for one in reversed(uploads))
        return [upload for upload in found if upload is not None]

    def begin(self, name: str, sha256: str) -> PendingUpload:
        """Begin a multipart upload."""
        with self._bucket.translating_errors(_WRITE):
            answer = self._call("create_multipart_upload", Key=self._key(name), Metadata={SHA256: sha256})
        return PendingUpload(name, answer["UploadId"], {})

    def put(self, upload: PendingUpload, part: UploadPart, data: bytes) -> str:
        """Store a part. The server compares one hash of it: the SHA-256 in the signature, or else its Content-MD5."""
        with self._bucket.translating_errors(_WRITE):
            checksum = {}
            if not signs_contents(self._bucket.client.s3.meta):
                md5 = hashlib.md5(data, usedforsecurity=False).digest()
                checksum["ContentMD5"] = base64.b64encode(md5).decode()
            answer = self._call(
                "upload_part",
                Key=self._key(upload.name),
                UploadId=upload.handle,
                PartNumber=part.number,
                Body=data,
                **checksum,
            )
        return str(answer["ETag"]).strip('"')

    def commit(self, upload: PendingUpload, parts: Mapping[int, str]) -> None:
        """Complete the multipart upload."""
        stored = self._with_parts(upload.name, upload.handle)
        tags = {} if stored is None else stored.parts
        numbers = [{"PartNumber": number, "ETag": f'"{tags.get(number, parts[number])}"'} for number in sorted(parts)]
        with self._bucket.translating_errors(_WRITE):
            self._call(
                "complete_multipart_upload",
                Key=self._key(upload.name),
                UploadId=upload.handle,
                MultipartUpload={"Parts": numbers},
            )

    def abort(self, upload: PendingUpload) -> None:
        """Abort the multipart upload; one that no longer exists is no error."""
        with self._bucket.translating_errors("cannot be cleaned up"), contextlib.suppress(FileNotFoundError):
            self._call("abort_multipart_upload", Key=self._key(upload.name), UploadId=upload.handle)

    def _with_parts(self, name: str, handle: str) -> PendingUpload | None:
        parts: dict[int, str] = {}
        marker = 0
        try:
            with self._bucket.translating_errors("cannot be read"):
                while True:
                    page = self._call("list_parts", Key=self._key(name), UploadId=handle, PartNumberMarker=marker)
                    parts |= {int(each["PartNumber"]): each["ETag"].strip('"') for each in page.get("Parts") or []}
                    if not page.get("IsTruncated"):
                        return PendingUpload(name, handle, parts)
                    marker = int(page["NextPartNumberMarker"])
        except FileNotFoundError:
            return None

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root else name

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._bucket.client.call_s3(method, Bucket=self._name, **arguments)


def signs_contents(meta: Any) -> bool:
    """Return whether a client's signature of a part contains its SHA-256, which the server compares. Pure.

    Over TLS it does not if the request has a Content-MD5: MD5 and TLS protect the contents.
    """
    settings = meta.config.s3 or {}
    return (
        meta.endpoint_url.startswith("http://")
        and meta.config.signature_version in _SIGNED
        and settings.get("payload_signing_enabled") is not False
    )
