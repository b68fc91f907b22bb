"""The operator's own certificate authority: its contents and its renewal. Pure, except for generating random keys.

`manager` reads it from a Secret and writes it back. A successor is created long before the authority expires, and all
supervisors trust it for `OVERLAP` before it signs, so a running pod always trusts the coordinator's certificate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_LIFETIME = timedelta(days=730)
CERTIFICATE_LIFETIME = timedelta(days=90)
RENEW_REMAINING = 1 / 3
"""Remaining share of its lifetime at which a certificate is renewed."""
OVERLAP = timedelta(days=7)
"""A new authority is trusted for this time before it signs: kubelets need less to update mounted ConfigMaps."""
BACKDATE = timedelta(minutes=5)
"""Tolerated clock difference: a certificate is valid from this long before its creation."""
NAME = "finetune-operator"
UNUSED = (
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "encipher_only",
    "decipher_only",
)
"""Key usages that none of these certificates has."""


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key, as PEM."""

    certificate: str
    key: str

    @property
    def parsed(self) -> x509.Certificate:
        """The parsed certificate."""
        return x509.load_pem_x509_certificate(self.certificate.encode())


@dataclass(frozen=True)
class TlsMaterial:
    """The complete content of the Secret."""

    signer: KeyPair
    """The authority that signs."""
    server: KeyPair
    """The coordinator's certificate."""
    successor: KeyPair | None = None
    """The authority that signs next; it is already trusted."""
    previous: tuple[str, ...] = ()
    """Authorities that no longer sign and have not expired."""

    @property
    def bundle(self) -> str:
        """Authorities that supervisors trust, as PEM."""
        successor = [self.successor.certificate] if self.successor else []
        return "".join([self.signer.certificate, *successor, *self.previous])


def renew(material: TlsMaterial | None, hosts: tuple[str, ...], now: datetime) -> TlsMaterial:
    """Return the material to use from now on; the same object if nothing has to be renewed."""
    if material is None or _is_expired(material.signer, now):
        signer = new_authority(now)
        return TlsMaterial(signer, new_certificate(signer, hosts, now))
    renewed = _drop_expired(_rotate(material, now), now)
    if not _is_server_valid(renewed, hosts, now):
        renewed = TlsMaterial(
            renewed.signer, new_certificate(renewed.signer, hosts, now), renewed.successor, renewed.previous
        )
    return renewed


def new_authority(now: datetime) -> KeyPair:
    """Create a self-signed authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    # A random number makes the name unique: clients could confuse two authorities with the same name.
    name = _name(f"{NAME} {x509.random_serial_number():x}")
    builder = _builder(name, name, key.public_key(), now, AUTHORITY_LIFETIME)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    return _pair(builder.sign(key, hashes.SHA256()), key)


def new_certificate(authority: KeyPair, hosts: Iterable[str], now: datetime) -> KeyPair:
    """Create a server certificate for DNS names."""
    key, signer = ec.generate_private_key(ec.SECP256R1()), authority.parsed
    names = [x509.DNSName(host) for host in hosts]
    builder = _builder(_name(NAME), signer.subject, key.public_key(), now, CERTIFICATE_LIFETIME)
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName(names), False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    signing_key = load_pem_private_key(authority.key.encode(), None)
    assert isinstance(signing_key, ec.EllipticCurvePrivateKey)
    return _pair(builder.sign(signing_key, hashes.SHA256()), key)


def to_secret(material: TlsMaterial) -> dict[str, str]:
    """Return the Secret's data, not base64-encoded."""
    data = {
        "ca.crt": material.bundle,
        "tls.crt": material.server.certificate,
        "tls.key": material.server.key,
        "signer.crt": material.signer.certificate,
        "signer.key": material.signer.key,
        "former.crt": "".join(material.previous),
    }
    if material.successor is not None:
        data |= {"successor.crt": material.successor.certificate, "successor.key": material.successor.key}
    return data


def from_secret(data: Mapping[str, str]) -> TlsMaterial | None:
    """Parse the Secret's data; return None if it is empty or invalid, in which case all of it is created again."""
    try:
        signer, server = _read_pair(data, "signer"), _read_pair(data, "tls")
        successor = _read_pair(data, "successor") if "successor.crt" in data else None
        previous = data.get("former.crt", "").encode()
        certificates = x509.load_pem_x509_certificates(previous) if previous.strip() else []
        return TlsMaterial(signer, server, successor, tuple(_pem(certificate) for certificate in certificates))
    except (KeyError, ValueError, TypeError):
        return None


def _rotate(material: TlsMaterial, now: datetime) -> TlsMaterial:
    """Create a successor in time; let it sign once all supervisors trust it."""
    successor = material.successor
    if successor is None:
        if not _needs_renewal(material.signer, now):
            return material
        return TlsMaterial(material.signer, material.server, new_authority(now), material.previous)
    if now < successor.parsed.not_valid_before_utc + BACKDATE + OVERLAP:
        return material
    return TlsMaterial(successor, material.server, None, (*material.previous, material.signer.certificate))


def _drop_expired(material: TlsMaterial, now: datetime) -> TlsMaterial:
    valid = tuple(
        pem for pem in material.previous if x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc > now
    )
    if valid == material.previous:
        return material
    return TlsMaterial(material.signer, material.server, material.successor, valid)


def _is_server_valid(material: TlsMaterial, hosts: tuple[str, ...], now: datetime) -> bool:
    """Return whether the server certificate is signed by the signer, for these names, and not due for renewal."""
    certificate = material.server.parsed
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return (
        not _needs_renewal(material.server, now)
        and certificate.issuer == material.signer.parsed.subject
        and tuple(names.get_values_for_type(x509.DNSName)) == hosts
    )


def _needs_renewal(pair: KeyPair, now: datetime) -> bool:
    certificate = pair.parsed
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return certificate.not_valid_after_utc - now < lifetime * RENEW_REMAINING


def _is_expired(pair: KeyPair, now: datetime) -> bool:
    return pair.parsed.not_valid_after_utc <= now


def _read_pair(data: Mapping[str, str], name: str) -> KeyPair:
    pair = KeyPair(data[f"{name}.crt"], data[f"{name}.key"])
    key = load_pem_private_key(pair.key.encode(), None)
    if key.public_key() != pair.parsed.public_key():
        raise ValueError(f"{name}.key is not the key of {name}.crt")
    return pair


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - BACKDATE).not_valid_after(now + lifetime)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature=True, key_cert_sign=signs, crl_sign=signs, **dict.fromkeys(UNUSED, False))


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> KeyPair:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return KeyPair(_pem(certificate), private.decode())


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()
