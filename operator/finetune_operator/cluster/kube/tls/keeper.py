"""Keeps the operator's own authority in a Secret of its namespace, and its certificate in files that a server loads.

Only the replica that leads calls it. Where another one was quicker, the write fails by the resource version, and what
that one wrote is taken.
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
from finetune_operator.cluster.kube.tls.authority import Material, from_secret, renew, to_secret
from finetune_operator.cluster.protocol import Clock

log = logging.getLogger(__name__)

LOOK_SECONDS = 3600.0
RETRY_SECONDS = 2.0


class CertificateKeeper:
    """One Secret, and the files of its certificate."""

    def __init__(self, api: KubeApi, namespace: str, name: str, hosts: tuple[str, ...], clock: Clock) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._hosts = hosts
        self._clock = clock
        # Keys lie in a folder of this user's alone, and go with the process.
        self._folder = tempfile.TemporaryDirectory(prefix="finetune-tls-")
        folder = Path(self._folder.name)
        self.certificate, self.key = folder / "tls.crt", folder / "tls.key"
        self.bundle = ""
        """What supervisors are to trust."""

    async def load(self) -> None:
        """Read the Secret, make or renew what is due, and write the files.

        Raises:
            ApiError: the Secret can be neither read nor written.
        """
        while True:
            try:
                material = await self._renewed()
                break
            except ApiError as error:
                if not error.passing and error.status != CONFLICT:
                    raise
                log.warning("cannot renew the coordinator's certificate yet: %s", error)
                await asyncio.sleep(error.retry_after_seconds or RETRY_SECONDS)
        self.bundle = material.bundle
        for path, text in ((self.certificate, material.server.certificate), (self.key, material.server.key)):
            if not path.exists() or path.read_text() != text:
                path.touch(mode=0o600)
                path.write_text(text)

    async def follow(self, changed: Callable[[str], None], look_seconds: float = LOOK_SECONDS) -> None:
        """Look again and again; tell of a bundle that is not the one before."""
        while True:
            await asyncio.sleep(look_seconds)
            before = self.bundle
            await self.load()
            if self.bundle != before:
                changed(self.bundle)

    async def _renewed(self) -> Material:
        stored = await self._read()
        data = {name: base64.b64decode(text).decode() for name, text in (stored.get("data") or {}).items()}
        kept = from_secret(data)
        if data and kept is None:
            log.warning("the Secret %s/%s holds no usable authority: it is made anew", self._namespace, self._name)
        material = renew(kept, self._hosts, self._clock())
        if material is not kept:
            await self._write(stored, material)
            log.info("the coordinator's certificate was renewed")
        return material

    async def _read(self) -> Json:
        try:
            return await self._api.get(SECRETS.path(self._namespace, self._name))
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise
            return {}

    async def _write(self, stored: Json, material: Material) -> None:
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
