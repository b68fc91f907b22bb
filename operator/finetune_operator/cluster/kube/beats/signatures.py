"""Verifies the tokens of pods with the public keys of the API server, without a request for each token.

A TokenReview for each pod is a large part of the requests of a burst, and a new leader would need one for every pod
before it hears any of them. The API server publishes the keys of its tokens (`/openid/v1/jwks`); its default roles
allow every service account to read them. Tokens that cannot be verified in this way are reviewed (see `tokens`).
A token names its pod and the pod's UID, so it is useless once the pod is deleted: the caller looks for the pod.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from finetune_operator.cluster.kube.client.client import ApiError, Json, KubeApi

log = logging.getLogger(__name__)

DISCOVERY_PATH = "/.well-known/openid-configuration"
KEYS_PATH = "/openid/v1/jwks"
KEYS_TYPE = "application/jwk-set+json"
RELOAD_SECONDS = 300.0
"""Age at which the keys are read again: a key that the API server no longer publishes must not be trusted."""
RETRY_SECONDS = 60.0
"""Minimum time between two reads, whatever tokens arrive."""
LEEWAY_SECONDS = 60.0
"""Difference of the clocks that is accepted for the start of a token's validity."""
HASHES: dict[str, hashes.HashAlgorithm] = {
    "256": hashes.SHA256(),
    "384": hashes.SHA384(),
    "512": hashes.SHA512(),
}
CURVES = {"ES256": "secp256r1", "ES384": "secp384r1", "ES512": "secp521r1"}
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class BoundPod:
    """The pod that a token is bound to."""

    namespace: str
    pod: str
    pod_uid: str


class UnknownKeyError(Exception):
    """The token was issued by another issuer or with an unknown key: only the API server can review it."""


class TokenKeys:
    """The API server's issuer and public keys, read again at intervals."""

    def __init__(self, api: KubeApi, audience: str, wall: Callable[[], float]) -> None:
        self._api = api
        self._audience = audience
        self._wall = wall
        self._issuer = ""
        self._keys: dict[str, PublicKey] = {}
        self._read_at = float("-inf")
        self._tried_at = float("-inf")

    async def verify(self, token: str) -> BoundPod | None:
        """Return the pod of a token; None if the token is not valid.

        Raises:
            UnknownKeyError: a TokenReview must decide.
        """
        if self._wall() - self._read_at > RELOAD_SECONDS:
            await self._reload()
        try:
            return self._verify(token)
        except UnknownKeyError:
            # The API server may have a new key.
            if not await self._reload():
                raise
        return self._verify(token)

    def _verify(self, token: str) -> BoundPod | None:
        if self._wall() - self._read_at > 2 * RELOAD_SECONDS:
            raise UnknownKeyError
        return verify_token(token, self._issuer, self._keys, self._audience, self._wall())

    async def _reload(self) -> bool:
        """Read the keys; return whether they were read now."""
        if self._wall() - self._tried_at < RETRY_SECONDS:
            return False
        self._tried_at = self._wall()
        try:
            configuration = await self._api.get(DISCOVERY_PATH)
            keys = await self._api.get(KEYS_PATH, accept=KEYS_TYPE)
        except ApiError as error:
            log.info("cannot read the keys of the API server's tokens; each token is reviewed: %s", error)
            return False
        self._issuer, self._keys = configuration.get("issuer", ""), parse_keys(keys)
        self._read_at = self._wall()
        return True


def verify_token(token: str, issuer: str, keys: dict[str, PublicKey], audience: str, now: float) -> BoundPod | None:
    """Return the pod of a token that is valid now; None if it is not valid, or bound to no pod.

    Raises:
        UnknownKeyError: the issuer or the key is unknown.
    """
    parts = token.split(".")
    if len(parts) != 3:
        return None
    header, claims = _decode_json(parts[0]), _decode_json(parts[1])
    key = keys.get(str(header.get("kid")))
    if key is None or not issuer or claims.get("iss") != issuer:
        raise UnknownKeyError
    if not _is_signed(key, str(header.get("alg")), f"{parts[0]}.{parts[1]}".encode(), _decode(parts[2])):
        return None
    audiences = claims.get("aud")
    if audience not in (audiences if isinstance(audiences, list) else [audiences]):
        return None
    expires, starts = claims.get("exp"), claims.get("nbf", 0)
    if not isinstance(expires, int | float) or not isinstance(starts, int | float):
        return None
    return _bound_pod(claims) if starts - LEEWAY_SECONDS <= now < expires else None


def parse_keys(answer: Json) -> dict[str, PublicKey]:
    """Return the public keys of a JSON Web Key Set (RFC 7517) by their ID; keys of other types are left out."""
    keys = {}
    for item in answer.get("keys") or ():
        if (key := _parse_key(item)) is not None:
            keys[str(item.get("kid"))] = key
    return keys


def _parse_key(item: Json) -> PublicKey | None:
    try:
        if item.get("kty") == "RSA":
            return rsa.RSAPublicNumbers(_number(item["e"]), _number(item["n"])).public_key()
        if item.get("kty") == "EC":
            curve = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}[item["crv"]]
            return ec.EllipticCurvePublicNumbers(_number(item["x"]), _number(item["y"]), curve).public_key()
    except (KeyError, ValueError, TypeError):
        log.warning("the API server publishes a key that cannot be read: %s", item.get("kid"))
    return None


def _is_signed(key: PublicKey, algorithm: str, data: bytes, signature: bytes) -> bool:
    """Return whether a signature is valid (RFC 7518). The type of the key decides, not the token's header alone."""
    digest = HASHES.get(algorithm[2:])
    if digest is None:
        return False
    try:
        if isinstance(key, rsa.RSAPublicKey) and algorithm.startswith("RS"):
            key.verify(signature, data, padding.PKCS1v15(), digest)
            return True
        if isinstance(key, ec.EllipticCurvePublicKey) and CURVES.get(algorithm) == key.curve.name:
            half = len(signature) // 2
            pair = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
            key.verify(encode_dss_signature(*pair), data, ec.ECDSA(digest))
            return True
    except InvalidSignature:
        pass
    return False


def _bound_pod(claims: Json) -> BoundPod | None:
    bound: Any = claims.get("kubernetes.io")
    pod = bound.get("pod") if isinstance(bound, dict) else None
    if not isinstance(pod, dict):
        return None
    values = [value for value in (bound.get("namespace"), pod.get("name"), pod.get("uid")) if value]
    return BoundPod(*map(str, values)) if len(values) == 3 else None


def _decode_json(part: str) -> Json:
    try:
        found = json.loads(_decode(part))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _decode(part: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except (binascii.Error, ValueError):
        return b""


def _number(text: str) -> int:
    return int.from_bytes(_decode(text), "big")
