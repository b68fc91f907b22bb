"""Beats over TLS with tokens that the API server reviews, as a supervisor in a pod would send them."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from finetune_contract.heartbeat import RankState
from finetune_operator.cluster.kube.beats.tokens import expiry, read_review
from finetune_operator.cluster.kube.tls.context import ServerCertificate
from testing.controlplane.pki import Authority
from testing.controlplane.process import LOOPBACK, wait_for
from testing.controlplane.server import ControlPlane
from testing.operator.harness import HOME, Jobs, running
from testing.operator.heartbeats import AUDIENCE, SERVICE, Talk, tls_flags
from tests.operator.conftest import NewOperator

QUIET = {"peerLost": False, "stacks": False}
"""What a reply holds where nothing is wrong."""


@pytest.mark.cluster
def test_beats_become_progress(talk: Talk) -> None:
    tokens = {rank: talk.token(f"circles-a1-n{rank}") for rank in range(2)}
    for rank, token in tokens.items():
        status, answer = talk.post(talk.beat(f"circles-a1-n{rank}", 40), token)
        assert status == 200
        assert json.loads(answer) == {"order": "Continue", "attempt": 1, "beatSeconds": 5.0} | QUIET
    wait_for("the step is shown", lambda: talk.jobs.status("circles").get("step") == 40)
    status_now = talk.jobs.wait_phase("circles", "Running")
    assert (status_now["progress"], status_now["totalSteps"]) == ("40%", 100)
    assert talk.operator.metric("finetune_beats_total") == 2
    # The done ranks' words count at once, whatever becomes of their pods.
    for rank, token in tokens.items():
        talk.post(talk.beat(f"circles-a1-n{rank}", 100, state=RankState.DONE), token)
    talk.jobs.wait_phase("circles", "Succeeded")


@pytest.mark.cluster
def test_who_may_speak_for_whom(talk: Talk) -> None:
    beat = talk.beat("circles-a1-n0", 1)
    assert talk.post(beat, talk.token("circles-a1-n0"))[0] == 200
    assert talk.post(beat, talk.token("circles-a1-n1"))[0] == 403
    assert talk.post(beat, talk.token("circles-a1-n0", audience="somebody-else"))[0] == 401
    assert talk.post(beat, "no.such.token")[0] == 401
    unbound = talk.jobs.control_plane.token_for("default", talk.jobs.namespace, audiences=[AUDIENCE])
    assert talk.post(beat, unbound)[0] == 401


@pytest.mark.cluster
def test_a_token_dies_with_its_pod(talk: Talk) -> None:
    beat, token = talk.beat("circles-a1-n0", 1), talk.token("circles-a1-n0")
    assert talk.post(beat, token)[0] == 200
    talk.jobs.delete_pod("circles-a1-n0")
    wait_for("the token is refused", lambda: talk.post(beat, token)[0] == 401)


@pytest.mark.cluster
def test_a_pod_that_beats_without_end_is_held_back(talk: Talk) -> None:
    token = talk.token("circles-a1-n0")
    beats = [talk.beat("circles-a1-n0", 1)] * 60
    answers = {talk.post(beat, token)[0] for beat in beats}
    assert answers == {200, 429}


@pytest.mark.cluster
def test_the_leader_is_the_endpoint_of_the_service(jobs: Jobs, new_operator: NewOperator) -> None:
    flags = tls_flags(jobs.control_plane)
    first = new_operator(*flags, "--identity=first")
    second = new_operator(*flags, "--pod-ip=10.0.0.2", "--identity=second")
    with running(first):
        assert endpoint(jobs.control_plane) == ("10.0.0.1", first.coordinator_port)
        second.start()
        wait_for("the second one waits", lambda: second.get("/readyz")[0] == 200)
        assert endpoint(jobs.control_plane) == ("10.0.0.1", first.coordinator_port)
        first.kill()
        second.wait_ready()
        assert endpoint(jobs.control_plane) == ("10.0.0.2", second.coordinator_port)


def endpoint(cluster: ControlPlane) -> tuple[str, int]:
    found = cluster.api.get(f"/apis/discovery.k8s.io/v1/namespaces/{HOME}/endpointslices/{SERVICE}")
    ((address,),) = (one["addresses"] for one in found["endpoints"])
    return address, found["ports"][0]["port"]


def test_a_renewed_certificate_is_served_to_new_connections(tmp_path: Path) -> None:
    old = Authority(tmp_path / "old", "old").issue("server", hosts=[LOOPBACK])
    authority = Authority(tmp_path / "new", "new")
    new = authority.issue("server", hosts=[LOOPBACK])

    async def serve() -> None:
        certificate = ServerCertificate(old.certificate, old.key)
        follower = asyncio.create_task(certificate.follow(look_seconds=0.01))
        server = await asyncio.start_server(lambda _, writer: writer.close(), LOOPBACK, 0, ssl=certificate.context)
        port = server.sockets[0].getsockname()[1]
        trusts_new = ssl.create_default_context(cafile=str(authority.certificate))
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection(LOOPBACK, port, ssl=trusts_new)
        # A file at a time, as a volume of a Secret does not, but a person may.
        old.certificate.write_bytes(new.certificate.read_bytes())
        old.key.write_bytes(new.key.read_bytes())
        async with asyncio.timeout(20):
            while not await accepted(port, trusts_new):
                pass
        follower.cancel()
        server.close()

    asyncio.run(serve())


async def accepted(port: int, context: ssl.SSLContext) -> bool:
    try:
        _, writer = await asyncio.open_connection(LOOPBACK, port, ssl=context)
    except ssl.SSLError:
        await asyncio.sleep(0.01)
        return False
    writer.close()
    return True


def review(**status: Any) -> dict[str, Any]:
    return {"status": status}


POD_USER = {
    "username": "system:serviceaccount:team:trainer",
    "extra": {"authentication.kubernetes.io/pod-name": ["p"], "authentication.kubernetes.io/pod-uid": ["u"]},
}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        review(authenticated=False),
        review(authenticated=True, audiences=["other"], user=POD_USER),
        review(authenticated=True, audiences=[AUDIENCE], user={"username": "admin"}),
        review(authenticated=True, audiences=[AUDIENCE], user={**POD_USER, "username": "admin"}),
        review(authenticated=True, user=POD_USER),
    ],
)
def test_reviews_that_name_no_pod(answer: dict[str, Any]) -> None:
    assert read_review(answer, AUDIENCE) is None


def test_a_review_names_the_pod() -> None:
    bearer = read_review(review(authenticated=True, audiences=[AUDIENCE], user=POD_USER), AUDIENCE)
    assert bearer is not None
    assert (bearer.namespace, bearer.pod, bearer.pod_uid) == ("team", "p", "u")


@pytest.mark.parametrize(("token", "end"), [("x", 0.0), ("a.b.c", 0.0), ("a.eyJleHAiOiAxMjN9.c", 123.0)])
def test_when_a_token_ends(token: str, end: float) -> None:
    assert expiry(token) == end
