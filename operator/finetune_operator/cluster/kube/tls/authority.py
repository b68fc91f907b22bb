"""The operator's own certificate authority: what is kept of it, and when it is renewed. Pure but for the keys' dice.

`keeper` reads it from a Secret and writes it back. An authority is renewed long before its end, and its successor is
trusted by everybody for `OVERLAP` before it signs anything: a pod that runs through it all never meets a stranger.
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

AUTHORITY_LIFE = timedelta(days=730)
CERTIFICATE_LIFE = timedelta(days=90)
RENEW_LEFT = 1 / 3
"""Share of its life that is left when something is renewed."""
OVERLAP = timedelta(days=7)
"""How long a new authority is trusted before it signs: far longer than the kubelets need to hand it to the pods."""
BACKDATE = timedelta(minutes=5)
"""Clocks differ: a certificate is good a little before it was made."""
NAME = "finetune-operator"
UNUSED = (
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "encipher_only",
    "decipher_only",
)
"""Uses of a key that none of these certificates is for."""


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as PEM."""

    certificate: str
    key: str

    @property
    def read(self) -> x509.Certificate:
        """The certificate."""
        return x509.load_pem_x509_certificate(self.certificate.encode())


@dataclass(frozen=True)
class Material:
    """All that is kept."""

    signer: Pair
    """The authority that signs."""
    server: Pair
    """The coordinator's certificate."""
    successor: Pair | None = None
    """The authority that will sign next: trusted already."""
    former: tuple[str, ...] = ()
    """Authorities that sign no more, while they last."""

    @property
    def bundle(self) -> str:
        """What supervisors trust, as PEM."""
        successor = [self.successor.certificate] if self.successor else []
        return "".join([self.signer.certificate, *successor, *self.former])


def renew(material: Material | None, hosts: tuple[str, ...], now: datetime) -> Material:
    """What is to be kept from now on; the same object where nothing is due."""
    if material is None or _ended(material.signer, now):
        signer = new_authority(now)
        return Material(signer, new_certificate(signer, hosts, now))
    renewed = _drop_former(_advance(material, now), now)
    if not _serves(renewed, hosts, now):
        renewed = Material(
            renewed.signer, new_certificate(renewed.signer, hosts, now), renewed.successor, renewed.former
        )
    return renewed


def new_authority(now: datetime) -> Pair:
    """An authority that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    # Its own number makes its name its own: two authorities of one name could be taken for one another.
    name = _name(f"{NAME} {x509.random_serial_number():x}")
    builder = _builder(name, name, key.public_key(), now, AUTHORITY_LIFE)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    return _pair(builder.sign(key, hashes.SHA256()), key)


def new_certificate(authority: Pair, hosts: Iterable[str], now: datetime) -> Pair:
    """A server's certificate for some DNS names."""
    key, signer = ec.generate_private_key(ec.SECP256R1()), authority.read
    names = [x509.DNSName(host) for host in hosts]
    builder = _builder(_name(NAME), signer.subject, key.public_key(), now, CERTIFICATE_LIFE)
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


def to_secret(material: Material) -> dict[str, str]:
    """The Secret's data, in plain text."""
    data = {
        "ca.crt": material.bundle,
        "tls.crt": material.server.certificate,
        "tls.key": material.server.key,
        "signer.crt": material.signer.certificate,
        "signer.key": material.signer.key,
        "former.crt": "".join(material.former),
    }
    if material.successor is not None:
        data |= {"successor.crt": material.successor.certificate, "successor.key": material.successor.key}
    return data


def from_secret(data: Mapping[str, str]) -> Material | None:
    """What a Secret holds; None where it is empty or cannot be read: then all of it is made anew."""
    try:
        signer, server = _read_pair(data, "signer"), _read_pair(data, "tls")
        successor = _read_pair(data, "successor") if "successor.crt" in data else None
        former = data.get("former.crt", "").encode()
        kept = x509.load_pem_x509_certificates(former) if former.strip() else []
        return Material(signer, server, successor, tuple(_pem(one) for one in kept))
    except (KeyError, ValueError, TypeError):
        return None


def _advance(material: Material, now: datetime) -> Material:
    """Make a successor in time; let it sign once everybody knows it."""
    successor = material.successor
    if successor is None:
        if not _due(material.signer, now):
            return material
        return Material(material.signer, material.server, new_authority(now), material.former)
    if now < successor.read.not_valid_before_utc + BACKDATE + OVERLAP:
        return material
    return Material(successor, material.server, None, (*material.former, material.signer.certificate))


def _drop_former(material: Material, now: datetime) -> Material:
    lasting = tuple(
        one for one in material.former if x509.load_pem_x509_certificate(one.encode()).not_valid_after_utc > now
    )
    if lasting == material.former:
        return material
    return Material(material.signer, material.server, material.successor, lasting)


def _serves(material: Material, hosts: tuple[str, ...], now: datetime) -> bool:
    """Whether the server's certificate is of the signer, for these names, and not near its end."""
    certificate = material.server.read
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return (
        not _due(material.server, now)
        and certificate.issuer == material.signer.read.subject
        and tuple(names.get_values_for_type(x509.DNSName)) == hosts
    )


def _due(pair: Pair, now: datetime) -> bool:
    certificate = pair.read
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return certificate.not_valid_after_utc - now < life * RENEW_LEFT


def _ended(pair: Pair, now: datetime) -> bool:
    return pair.read.not_valid_after_utc <= now


def _read_pair(data: Mapping[str, str], name: str) -> Pair:
    pair = Pair(data[f"{name}.crt"], data[f"{name}.key"])
    key = load_pem_private_key(pair.key.encode(), None)
    if key.public_key() != pair.read.public_key():
        raise ValueError(f"{name}.crt and {name}.key do not belong together")
    return pair


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - BACKDATE).not_valid_after(now + life)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature=True, key_cert_sign=signs, crl_sign=signs, **dict.fromkeys(UNUSED, False))


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Pair(_pem(certificate), private.decode())


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()
