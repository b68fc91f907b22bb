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
from finetune_operator.cluster.kube.client.client import (
    CONFLICT,
    FORBIDDEN,
    LEADER_SECONDS,
    NOT_FOUND,
    ApiError,
    Json,
    KubeApi,
    NotLeaderError,
    SetupError,
)
from finetune_operator.cluster.kube.client.objects import SECRETS
from finetune_operator.cluster.kube.tls.authority import TlsMaterial, from_secret, renew, to_secret
from finetune_operator.cluster.protocol import Clock

log = logging.getLogger(__name__)

CHECK_SECONDS = 300.0
RETRY_SECONDS = 2.0
PROBLEM_SECONDS = 5.0
"""Time between two tries while the Secret cannot be used and somebody has to change something."""


class CertificateManager:
    """The Secret, and the files of the certificate."""

    def __init__(self, api: KubeApi, namespace: str, name: str, hosts: tuple[str, ...], clock: Clock) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._hosts = hosts
        self._clock = clock
        self._material: TlsMaterial | None = None
        """Contents of the files. They are written back into a Secret that was deleted and created again."""
        self._problem = ""
        # The folder is readable by this user only, and is deleted when the process ends.
        self._folder = tempfile.TemporaryDirectory(prefix="finetune-tls-")
        folder = Path(self._folder.name)
        self.certificate, self.key = folder / "tls.crt", folder / "tls.key"
        self.bundle = ""
        """Authorities that supervisors trust, as PEM."""

    async def load(self) -> None:
        """Read the Secret, create or renew its contents if needed, and write the files. Retry until this succeeds."""
        while True:
            try:
                material = await self._load_or_renew()
                break
            except SetupError as problem:
                self._log_problem(str(problem))
                await asyncio.sleep(PROBLEM_SECONDS)
            except ApiError as error:
                log.warning("cannot renew the coordinator's certificate; retrying: %s", error)
                await asyncio.sleep(error.retry_after_seconds or RETRY_SECONDS)
            except NotLeaderError:
                await asyncio.sleep(LEADER_SECONDS)
        self._problem = ""
        self._material = material
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
        kept = from_secret(data)
        if data and kept is None:
            log.warning("the Secret %s/%s contains no valid authority; creating it again", self._namespace, self._name)
        material = renew(kept or self._material, self._hosts, self._clock())
        if material is not kept:
            await self._write(stored, material)
            log.info("renewed the coordinator's certificate")
        return material

    def _log_problem(self, problem: str) -> None:
        if problem != self._problem:
            log.error("%s", problem)
        self._problem = problem

    async def _read(self) -> Json:
        try:
            return await self._api.get(SECRETS.path(self._namespace, self._name))
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise self._explain(error) from error
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
        try:
            if stored:
                await self._api.replace(SECRETS.path(self._namespace, self._name), body)
            else:
                await self._api.create(SECRETS.path(self._namespace), body)
        except ApiError as error:
            raise self._explain(error, exists=bool(stored)) from error

    def _explain(self, error: ApiError, *, exists: bool = True) -> Exception:
        """Return the error; for one that needs a change by an administrator, a message that names the change."""
        if error.transient or error.status == CONFLICT:
            return error
        secret = f"the Secret {self._namespace}/{self._name}"
        if not exists and error.status == FORBIDDEN:
            return SetupError(
                f"{secret} with the coordinator's certificate does not exist, and the operator may not create Secrets: "
                "run `helm upgrade` with the chart of this release to create it again"
            )
        return SetupError(
            f"the API server refuses {secret} with the coordinator's certificate: {error}; "
            "run `helm upgrade` with the chart of this release to restore the permissions of the operator"
        )
