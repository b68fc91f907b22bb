"""The coordinator's endpoint over TLS, with certificates that may be renewed while it runs."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0


class ServerCertificate:
    """A context for a server, and the files that it is from."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Load them.

        Raises:
            OSError, ssl.SSLError: they cannot be read, or do not belong together.
        """
        self._certificate = certificate
        self._key = key
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._loaded = self._state()
        self.context.load_cert_chain(certificate, key)

    async def follow(self, look_seconds: float = LOOK_SECONDS) -> None:
        """Load them anew whenever they change; connections made from then on get the new certificate."""
        while True:
            await asyncio.sleep(look_seconds)
            try:
                state = await asyncio.to_thread(self._state)
                if state == self._loaded:
                    continue
                self.context.load_cert_chain(self._certificate, self._key)
            except (OSError, ssl.SSLError) as error:
                # Half of a pair may be there already: the next look finds the other one.
                log.warning("the coordinator's certificate cannot be loaded anew: %s", error)
            else:
                self._loaded = state
                log.info("the coordinator's certificate was loaded anew")

    def _state(self) -> tuple[int, int]:
        return self._certificate.stat().st_mtime_ns, self._key.stat().st_mtime_ns
