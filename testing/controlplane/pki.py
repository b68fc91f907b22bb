"""Certificates and keys of the control plane, created with the `openssl` program.

Called by `server`, and by tests that serve TLS to the API server or to the operator (webhooks, the coordinator).
"""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VALID_DAYS = "30"
EC_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
# The machine's openssl.cnf could add extensions.
NO_CONFIG = ("-config", "/dev/null")


@dataclass(frozen=True)
class Certificate:
    """A certificate and its private key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority in its own folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._root = self._files("ca")
        extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,digitalSignature,cRLSign"]
        _openssl(*_request(self._root, f"/CN={name}", extensions))

    @property
    def certificate(self) -> Path:
        """The authority's own certificate, which clients trust."""
        return self._root.certificate

    @property
    def key(self) -> Path:
        """The authority's private key."""
        return self._root.key

    def issue(self, name: str, hosts: Sequence[str] = (), groups: Sequence[str] = ()) -> Certificate:
        """Issue a certificate for a server at `hosts` (names or addresses) or for a client in `groups`."""
        files = self._files(name.replace(":", "-"))
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={name}"
        signer = ("-CA", str(self._root.certificate), "-CAkey", str(self._root.key))
        extensions = [
            "basicConstraints=critical,CA:FALSE",
            "keyUsage=critical,digitalSignature",
            "extendedKeyUsage=serverAuth,clientAuth",
        ]
        if hosts:
            extensions.append("subjectAltName=" + ",".join(map(_alternative_name, hosts)))
        _openssl(*_request(files, subject, extensions), *signer)
        return files

    def _files(self, name: str) -> Certificate:
        return Certificate(self._folder / f"{name}.crt", self._folder / f"{name}.key")


def signing_key(folder: Path, name: str) -> Certificate:
    """Create a key pair that signs tokens; its public key takes the place of the certificate."""
    pair = Certificate(folder / f"{name}.pub", folder / f"{name}.key")
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(pair.key))
    _openssl("pkey", "-in", str(pair.key), "-pubout", "-out", str(pair.certificate))
    return pair


def _request(files: Certificate, subject: str, extensions: Sequence[str]) -> list[str]:
    """Return the arguments that create a key and a certificate for it."""
    outputs = ["-keyout", str(files.key), "-out", str(files.certificate)]
    added = [part for extension in extensions for part in ("-addext", extension)]
    return ["req", "-x509", *EC_KEY, "-days", VALID_DAYS, "-subj", subject, *added, *outputs, *NO_CONFIG]


def _alternative_name(host: str) -> str:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return f"DNS:{host}"
    return f"IP:{host}"


def _openssl(*arguments: str) -> None:
    try:
        result = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError("The control plane needs the program `openssl`, 3.0 or newer: install openssl.") from None
    if result.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]} failed (version 3.0 or newer is required):\n{result.stderr}")
