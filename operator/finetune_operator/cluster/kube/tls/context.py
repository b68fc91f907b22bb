"""The TLS context of the coordinator's endpoint, with certificates that may be renewed while it runs."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)

CHECK_SECONDS = 10.0


class ServerCertificate:
    """A server's TLS context, and the files that it is loaded from."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Load the files.

        Raises:
            OSError, ssl.SSLError: they cannot be read, or the key is not the certificate's.
        """
        self._certificate = certificate
        self._key = key
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._loaded = self._modification_times()
        self.context.load_cert_chain(certificate, key)

    async def reload_on_change(self, check_seconds: float = CHECK_SECONDS) -> None:
        """Reload the files whenever they change; later connections use the new certificate."""
        while True:
            await asyncio.sleep(check_seconds)
            try:
                times = await asyncio.to_thread(self._modification_times)
                if times == self._loaded:
                    continue
                self.context.load_cert_chain(self._certificate, self._key)
            except (OSError, ssl.SSLError) as error:
                # Only one of the two files may have been replaced: the next check finds the other one.
                log.warning("cannot reload the coordinator's certificate: %s", error)
            else:
                self._loaded = times
                log.info("reloaded the coordinator's certificate")

    def _modification_times(self) -> tuple[int, int]:
        return self._certificate.stat().st_mtime_ns, self._key.stat().st_mtime_ns
