"""Keeps the operator's own authority in a Secret, and the coordinator's certificate in files that the server loads.

Only the leader calls it. If another replica was faster, the write fails because of the resource version, and the
material that the other replica wrote is used.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from finetune_operator.api import labels, names
from finetune_operator.cluster.kube.client.client import CONFLICT, NOT_FOUND, ApiError, Json, KubeApi
from finetune_operator.cluster.kube.client.objects import SECRETS
from finetune_operator.cluster.kube.tls.authority import TlsMaterial, from_secret, renew, to_secret
from finetune_operator.cluster.protocol import Clock

log = logging.getLogger(__name__)

CHECK_SECONDS = 3600.0
RETRY_SECONDS = 2.0


class CertificateManager:
    """The Secret, and the files of the certificate."""

    def __init__(self, api: KubeApi, namespace: str, name: str, hosts: tuple[str, ...], clock: Clock) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._hosts = hosts
        self._clock = clock
        # The folder is readable by this user only, and is deleted when the process ends.
        self._folder = tempfile.TemporaryDirectory(prefix="finetune-tls-")
        folder = Path(self._folder.name)
        self.certificate, self.key = folder / "tls.crt", folder / "tls.key"
        self.bundle = ""
        """Authorities that supervisors trust, as PEM."""

    async def load(self) -> None:
        """Read the Secret, create or renew its contents if needed, and write the files.

        Raises:
            ApiError: the Secret cannot be read or written.
        """
        while True:
            try:
                material = await self._load_or_renew()
                break
            except ApiError as error:
                if not error.transient and error.status != CONFLICT:
                    raise
                log.warning("cannot renew the coordinator's certificate; retrying: %s", error)
                await asyncio.sleep(error.retry_after_seconds or RETRY_SECONDS)
        self.bundle = material.bundle
        for path, text in ((self.certificate, material.server.certificate), (self.key, material.server.key)):
            if not path.exists() or path.read_text() != text:
                path.touch(mode=0o600)
                path.write_text(text)

    async def renew_periodically(self, changed: Callable[[str], None], check_seconds: float = CHECK_SECONDS) -> None:
        """Check the certificate periodically; call `changed` with each new bundle."""
        while True:
            await asyncio.sleep(check_seconds)
            before = self.bundle
            await self.load()
            if self.bundle != before:
                changed(self.bundle)

    async def _load_or_renew(self) -> TlsMaterial:
        stored = await self._read()
        data = {name: base64.b64decode(text).decode() for name, text in (stored.get("data") or {}).items()}
        previous = from_secret(data)
        if data and previous is None:
            log.warning("the Secret %s/%s contains no valid authority; creating it again", self._namespace, self._name)
        material = renew(previous, self._hosts, self._clock())
        if material is not previous:
            await self._write(stored, material)
            log.info("renewed the coordinator's certificate")
        return material

    async def _read(self) -> Json:
        try:
            return await self._api.get(SECRETS.path(self._namespace, self._name))
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise
            return {}

    async def _write(self, stored: Json, material: TlsMaterial) -> None:
        meta = stored.get("metadata") or {
            "name": self._name,
            "namespace": self._namespace,
            "labels": {labels.MANAGED_BY: names.OPERATOR},
        }
        data = {name: base64.b64encode(text.encode()).decode() for name, text in to_secret(material).items()}
        meta = {key: value for key, value in meta.items() if key != "managedFields"}
        body = {"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": meta, "data": data}
        if stored:
            await self._api.replace(SECRETS.path(self._namespace, self._name), body)
        else:
            await self._api.create(SECRETS.path(self._namespace), body)
