"""Verification of tokens by their signature."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from finetune_operator.cluster.kube.beats.signatures import (
    KEYS_PATH,
    RELOAD_SECONDS,
    RETRY_SECONDS,
    BoundPod,
    TokenKeys,
    UnknownKeyError,
    parse_keys,
    verify_token,
)
from finetune_operator.cluster.kube.client.client import ApiError, KubeApi

ISSUER, AUDIENCE = "https://issuer", "coordinator"
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
POD = BoundPod("ns", "job-a1-n0", "uid")
CLAIMS: dict[str, Any] = {
    "iss": ISSUER,
    "aud": [AUDIENCE],
    "nbf": 1000,
    "exp": 2000,
    "kubernetes.io": {"namespace": "ns", "pod": {"name": "job-a1-n0", "uid": "uid"}},
}


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    return encode(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def sign(claims: Any, *, kid: str = "rsa", algorithm: str = "RS256") -> str:
    """Return a token that is signed with the key of a kind."""
    header = {"alg": algorithm, "kid": kid}
    signed = f"{encode(json.dumps(header).encode())}.{encode(json.dumps(claims).encode())}"
    if kid == "rsa":
        signature = RSA_KEY.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    else:
        pair = decode_dss_signature(EC_KEY.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        signature = b"".join(part.to_bytes(32, "big") for part in pair)
    return f"{signed}.{encode(signature)}"


def key_set() -> dict[str, Any]:
    """Return the keys as the API server publishes them."""
    public, point = RSA_KEY.public_key().public_numbers(), EC_KEY.public_key().public_numbers()
    return {
        "keys": [
            {"kty": "RSA", "kid": "rsa", "alg": "RS256", "n": number(public.n), "e": number(public.e)},
            {"kty": "EC", "kid": "ec", "crv": "P-256", "x": number(point.x), "y": number(point.y)},
            {"kty": "OKP", "kid": "other", "crv": "Ed25519", "x": "AAAA"},
        ]
    }


KEYS = parse_keys(key_set())


def verify(token: str, now: float = 1500.0) -> BoundPod | None:
    return verify_token(token, ISSUER, KEYS, AUDIENCE, now)


def test_valid_tokens_name_their_pod() -> None:
    assert sorted(KEYS) == ["ec", "rsa"]
    assert verify(sign(CLAIMS)) == POD
    assert verify(sign(CLAIMS, kid="ec", algorithm="ES256")) == POD
    assert verify(sign({**CLAIMS, "aud": AUDIENCE})) == POD


@pytest.mark.parametrize(
    "claims",
    [
        {**CLAIMS, "aud": ["other"]},
        {**CLAIMS, "aud": None},
        {**CLAIMS, "exp": 1500},
        {**CLAIMS, "exp": "2000"},
        {**CLAIMS, "nbf": 1600},
        {**CLAIMS, "kubernetes.io": {"namespace": "ns"}},
        {**CLAIMS, "kubernetes.io": {"namespace": "ns", "pod": {"name": "job-a1-n0"}}},
    ],
)
def test_tokens_with_wrong_claims_are_refused(claims: dict[str, Any]) -> None:
    assert verify(sign(claims)) is None


def test_changed_tokens_are_refused() -> None:
    header, claims, signature = sign(CLAIMS).split(".")
    other = encode(json.dumps({**CLAIMS, "exp": 9999}).encode())
    assert verify(f"{header}.{other}.{signature}") is None
    assert verify(f"{header}.{claims}.") is None
    assert verify(f"{header}.{claims}") is None
    # The type of the key decides, so no token chooses a weaker algorithm.
    for algorithm in ("none", "HS256", "ES256", "PS256"):
        assert verify(sign(CLAIMS, algorithm=algorithm)) is None


@pytest.mark.parametrize("token", [sign({**CLAIMS, "iss": "https://other"}), sign(CLAIMS, kid="ec").replace("a", "b")])
def test_other_issuers_and_keys_need_a_review(token: str) -> None:
    with pytest.raises(UnknownKeyError):
        verify_token(token, ISSUER, {"rsa": KEYS["rsa"]}, AUDIENCE, 1500.0)


class FakeApi:
    """Publishes keys, or refuses to. Stands in for the API server, whose keys a test cannot change in time."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] | None = key_set()
        self.num_reads = 0

    async def get(self, path: str, *_: Any, **__: Any) -> dict[str, Any]:
        if self.keys is None:
            raise ApiError(403, "Forbidden", "")
        self.num_reads += path == KEYS_PATH
        return self.keys if path == KEYS_PATH else {"issuer": ISSUER}


def test_keys_are_read_again_for_a_new_key_and_dropped_when_they_are_old() -> None:
    async def test() -> None:
        now = 1000.0
        api = FakeApi()
        keys = TokenKeys(cast(KubeApi, api), AUDIENCE, lambda: now)
        forever = {**CLAIMS, "exp": 10**9}
        assert await keys.verify(sign(forever)) == POD
        # Tokens with unknown keys do not cause a request each.
        api.keys = {"keys": []}
        with pytest.raises(UnknownKeyError):
            await keys.verify(sign(forever, kid="unknown", algorithm="ES256"))
        assert api.num_reads == 1
        now += RETRY_SECONDS
        with pytest.raises(UnknownKeyError):
            await keys.verify(sign(forever, kid="unknown", algorithm="ES256"))
        assert api.num_reads == 2
        # The key that is no longer published is not trusted.
        with pytest.raises(UnknownKeyError):
            await keys.verify(sign(forever))
        api.keys = key_set()
        now += RETRY_SECONDS
        assert await keys.verify(sign(forever)) == POD
        api.keys = None
        now += RELOAD_SECONDS + 1
        assert await keys.verify(sign(forever)) == POD
        now += RELOAD_SECONDS
        with pytest.raises(UnknownKeyError):
            await keys.verify(sign(forever))

    asyncio.run(test())
