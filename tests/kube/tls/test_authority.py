"""The operator's own certificate authority: its contents and renewal, and that all pods trust the certificate."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from finetune_operator.cluster.kube.tls.authority import (
    AUTHORITY_LIFETIME,
    CERTIFICATE_LIFETIME,
    OVERLAP,
    from_secret,
    renew,
    to_secret,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
HOSTS = ("coordinator.finetune-system.svc",)


def trusts(bundle: str, certificate: str, at: datetime, folder: Path) -> bool:
    """Return whether openssl, as an independent implementation, accepts the certificate."""
    (folder / "ca.crt").write_text(bundle)
    (folder / "tls.crt").write_text(certificate)
    command = ["openssl", "verify", "-attime", str(int(at.timestamp())), "-verify_hostname", HOSTS[0]]
    files = ["-CAfile", str(folder / "ca.crt"), str(folder / "tls.crt")]
    return subprocess.run([*command, *files], capture_output=True, check=False).returncode == 0


def test_created_certificate_is_valid(tmp_path: Path) -> None:
    material = renew(None, HOSTS, NOW)
    assert trusts(material.bundle, material.server.certificate, NOW, tmp_path)
    assert not trusts(renew(None, HOSTS, NOW).bundle, material.server.certificate, NOW, tmp_path)
    assert not trusts(material.bundle, material.server.certificate, NOW + CERTIFICATE_LIFETIME + DAY, tmp_path)


@pytest.mark.parametrize(
    ("hosts", "after", "same"),
    [
        (HOSTS, timedelta(0), True),
        (HOSTS, CERTIFICATE_LIFETIME * 0.6, True),
        (HOSTS, CERTIFICATE_LIFETIME * 0.7, False),
        (("other.svc",), timedelta(0), False),
    ],
)
def test_when_the_certificate_is_renewed(hosts: tuple[str, ...], after: timedelta, same: bool) -> None:
    material = renew(None, HOSTS, NOW)
    renewed = renew(material, hosts, NOW + after)
    assert (renewed is material) is same
    assert renewed.bundle == material.bundle


def test_running_pods_trust_every_certificate(tmp_path: Path) -> None:
    """Renew once a day for ten years: a pod with the bundle of a week ago trusts the certificate of today."""
    now, material = NOW, renew(None, HOSTS, NOW)
    bundles, signers, renewals = [material.bundle], {material.signer.certificate}, 0
    for _ in range(3650):
        now += DAY
        renewed = renew(material, HOSTS, now)
        if renewed.server != material.server:
            renewals += 1
            week_ago = bundles[-min(len(bundles), OVERLAP // DAY - 1)]
            assert trusts(week_ago, renewed.server.certificate, now, tmp_path)
            assert trusts(renewed.bundle, material.server.certificate, now, tmp_path)
        material = renewed
        bundles.append(material.bundle)
        signers.add(material.signer.certificate)
    assert len(signers) == 8
    assert renewals > 3650 * DAY / CERTIFICATE_LIFETIME
    assert len(material.previous) <= 1


def test_expired_authority_is_replaced() -> None:
    material = renew(None, HOSTS, NOW)
    assert renew(material, HOSTS, NOW + AUTHORITY_LIFETIME + DAY).signer != material.signer


def test_secret_contains_all_material() -> None:
    aged = renew(renew(None, HOSTS, NOW), HOSTS, NOW + AUTHORITY_LIFETIME * 0.8)
    assert aged.successor is not None
    later = renew(aged, HOSTS, NOW + AUTHORITY_LIFETIME * 0.8 + OVERLAP + DAY)
    assert later.previous
    for material in (aged, later):
        assert from_secret(to_secret(material)) == material


@pytest.mark.parametrize("broken", ["", "tls.key", "signer.crt"])
def test_invalid_secret_is_ignored(broken: str) -> None:
    data = to_secret(renew(None, HOSTS, NOW))
    assert from_secret({name: text for name, text in data.items() if broken and name != broken}) is None
    assert from_secret(data | {"tls.key": to_secret(renew(None, HOSTS, NOW))["tls.key"]}) is None
