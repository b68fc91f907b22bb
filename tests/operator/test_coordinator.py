"""Heartbeats over TLS with tokens that the API server reviews, as sent by a supervisor in a pod."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from finetune_contract.heartbeat import Performance, RankState, StepSettings, StepShares
from finetune_operator.cluster.kube.beats.tokens import parse_review, token_expiry
from finetune_operator.cluster.kube.tls.context import ServerCertificate
from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.pki import Authority
from testing.controlplane.process import LOOPBACK, wait_for
from testing.controlplane.server import ControlPlane
from testing.operator.harness import HOME, Jobs, running
from testing.operator.heartbeats import AUDIENCE, SERVICE, HeartbeatClient, create_service, tls_flags
from tests.operator.conftest import NewOperator

NO_FLAGS = {"peerLost": False, "stacks": False}
"""Flags of a reply when nothing is wrong."""


@pytest.mark.cluster
def test_heartbeats_update_the_progress(client: HeartbeatClient) -> None:
    tokens = {rank: client.token(f"circles-a1-n{rank}") for rank in range(2)}
    shares = StepShares(compute=0.25, data=0.5, exchange=0.25)
    settings = StepSettings(device="cpu", precision="bf16", batch_size=1, exchange_precision="fp32")
    performance = Performance(memory_allocated_bytes=3 * 2**20, shares=shares, settings=settings)
    for rank, token in tokens.items():
        status, answer = client.post(client.beat(f"circles-a1-n{rank}", 40, performance=performance), token)
        assert status == 200
        assert json.loads(answer) == {"order": "Continue", "attempt": 1, "beatSeconds": 5.0} | NO_FLAGS
    wait_for("the status shows the step", lambda: client.jobs.status("circles").get("step") == 40)
    status_now = client.jobs.wait_phase("circles", "Running")
    assert (status_now["progress"], status_now["totalSteps"]) == ("40%", 100)
    assert client.operator.metric("finetune_beats_total") == 2
    advice = status_now["performance"].pop("advice")
    assert [text.partition(":")[0] for text in advice] == ["data-bound", "exchange-bound", "exchange-bound"]
    assert status_now["performance"] == {
        "memoryAllocatedBytes": 3 * 2**20,
        "timeShares": {"compute": 0.25, "host": 0.0, "data": 0.5, "exchange": 0.25, "checkpoint": 0.0},
        "boundBy": "Data",
    }
    assert client.operator.metric('finetune_bound_jobs{by="Data"}') == 1
    assert client.operator.metric('finetune_step_time_ratio{part="exchange"}') == 0.25
    # Reports of finished ranks count at once, independent of the state of their pods.
    for rank, token in tokens.items():
        client.post(client.beat(f"circles-a1-n{rank}", 100, state=RankState.DONE), token)
    client.jobs.wait_phase("circles", "Succeeded")


@pytest.mark.cluster
def test_token_confirms_only_its_own_pod(client: HeartbeatClient) -> None:
    def num_reviews() -> float:
        samples = client.operator.metrics().items()
        return sum(value for key, value in samples if "requests_total" in key and 'resource="tokenreviews"' in key)

    beat, before = client.beat("circles-a1-n0", 1), num_reviews()
    assert client.post(beat, client.token("circles-a1-n0"))[0] == 200
    assert client.post(beat, client.token("circles-a1-n1"))[0] == 403
    assert client.post(beat, client.token("circles-a1-n0", audience="another-audience"))[0] == 401
    unbound = client.jobs.control_plane.token_for("default", client.jobs.namespace, audiences=[AUDIENCE])
    assert client.post(beat, unbound)[0] == 401
    # The operator's own role allows it to read the API server's public keys.
    assert num_reviews() == before
    assert client.post(beat, "no.such.token")[0] == 401
    assert num_reviews() == before + 1


@pytest.mark.cluster
def test_token_is_invalid_after_its_pod_is_deleted(client: HeartbeatClient) -> None:
    beat, token = client.beat("circles-a1-n0", 1), client.token("circles-a1-n0")
    assert client.post(beat, token)[0] == 200
    client.jobs.delete_pod("circles-a1-n0")
    wait_for("the token is refused", lambda: client.post(beat, token)[0] == 401)


@pytest.mark.cluster
def test_pod_that_sends_too_many_heartbeats_is_refused(client: HeartbeatClient) -> None:
    token = client.token("circles-a1-n0")
    beats = [client.beat("circles-a1-n0", 1)] * 60
    answers = {client.post(beat, token)[0] for beat in beats}
    assert answers == {200, 429}


@pytest.mark.cluster
def test_service_endpoint_is_the_leader(jobs: Jobs, new_operator: NewOperator) -> None:
    flags = tls_flags(jobs.control_plane)
    first = new_operator(*flags, "--identity=first")
    second = new_operator(*flags, "--pod-ip=10.0.0.2", "--identity=second")
    with running(first):
        assert endpoint(jobs.control_plane) == ("10.0.0.1", first.coordinator_port)
        second.start()
        wait_for("the second replica is on standby", lambda: second.get("/readyz")[0] == 200)
        assert endpoint(jobs.control_plane) == ("10.0.0.1", first.coordinator_port)
        first.kill()
        second.wait_ready()
        assert endpoint(jobs.control_plane) == ("10.0.0.2", second.coordinator_port)


@pytest.mark.cluster
def test_a_deleted_endpoint_or_service_is_reported_and_restored(jobs: Jobs, new_operator: NewOperator) -> None:
    cluster = jobs.control_plane
    slice_path = f"/apis/discovery.k8s.io/v1/namespaces/{HOME}/endpointslices/{SERVICE}"
    service_path = f"/api/v1/namespaces/{HOME}/services/{SERVICE}"
    with running(new_operator(*tls_flags(cluster))) as operator:
        expected = ("10.0.0.1", operator.coordinator_port)
        cluster.api.delete(slice_path)
        wait_for("the endpoint is published again", lambda: has_endpoint(cluster, expected))
        assert "was deleted by somebody else" in operator.log.read_text()
        cluster.api.patch(slice_path, {"endpoints": [{"addresses": ["10.9.9.9"]}]})
        wait_for("the endpoint is corrected", lambda: endpoint(cluster) == expected)
        assert "was changed by somebody else" in operator.log.read_text()
        # The garbage collector deletes the slice of a deleted Service.
        cluster.api.delete(service_path)
        wait_for("the replica is not ready", lambda: operator.get("/readyz")[0] == 503)
        assert f"{HOME}/{SERVICE} does not exist: run `helm upgrade`" in operator.log.read_text()
        assert operator.get("/livez")[0] == 200
        uid = create_service(cluster)
        wait_for("the replica is ready", lambda: operator.get("/readyz")[0] == 200)
        assert endpoint(cluster) == expected
        assert [owner["uid"] for owner in cluster.api.get(slice_path)["metadata"]["ownerReferences"]] == [uid]
        # Publishing without a change writes nothing.
        version = cluster.api.get(slice_path)["metadata"]["resourceVersion"]
        before = operator.metric(PATCHES)
        wait_for("the endpoint is published again", lambda: operator.metric(PATCHES) > before)
        assert cluster.api.get(slice_path)["metadata"]["resourceVersion"] == version


PATCHES = 'finetune_api_requests_total{code="200",method="PATCH",resource="endpointslices"}'


def has_endpoint(cluster: ControlPlane, expected: tuple[str, int]) -> bool:
    try:
        return endpoint(cluster) == expected
    except ControlPlaneApiError:
        return False


def endpoint(cluster: ControlPlane) -> tuple[str, int]:
    found = cluster.api.get(f"/apis/discovery.k8s.io/v1/namespaces/{HOME}/endpointslices/{SERVICE}")
    ((address,),) = (item["addresses"] for item in found["endpoints"])
    return address, found["ports"][0]["port"]


def test_a_renewed_certificate_is_served_to_new_connections(tmp_path: Path) -> None:
    old = Authority(tmp_path / "old", "old").issue("server", hosts=[LOOPBACK])
    authority = Authority(tmp_path / "new", "new")
    new = authority.issue("server", hosts=[LOOPBACK])

    async def serve() -> None:
        certificate = ServerCertificate(old.certificate, old.key)
        follower = asyncio.create_task(certificate.reload_on_change(check_seconds=0.01))
        server = await asyncio.start_server(lambda _, writer: writer.close(), LOOPBACK, 0, ssl=certificate.context)
        port = server.sockets[0].getsockname()[1]
        trusts_new = ssl.create_default_context(cafile=str(authority.certificate))
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection(LOOPBACK, port, ssl=trusts_new)
        # One file after the other, as an administrator may do it; a mounted Secret replaces both at once.
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
def test_review_without_a_pod_is_refused(answer: dict[str, Any]) -> None:
    assert parse_review(answer, AUDIENCE) is None


def test_review_returns_the_bound_pod() -> None:
    bound = parse_review(review(authenticated=True, audiences=[AUDIENCE], user=POD_USER), AUDIENCE)
    assert bound is not None
    assert (bound.namespace, bound.pod, bound.pod_uid) == ("team", "p", "u")


@pytest.mark.parametrize(("token", "end"), [("x", 0.0), ("a.b.c", 0.0), ("a.eyJleHAiOiAxMjN9.c", 123.0)])
def test_expiry_of_a_token(token: str, end: float) -> None:
    assert token_expiry(token) == end
