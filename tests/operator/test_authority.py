"""The operator's own certificate authority on a real cluster: supervisors get its certificates and their successors."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509

from finetune_operator.cluster.kube.client.client import KubeApi, connect
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.tls.authority import (
    AUTHORITY_LIFETIME,
    TlsMaterial,
    from_secret,
    new_certificate,
    renew,
    to_secret,
)
from finetune_operator.cluster.kube.tls.manager import CertificateManager
from testing.controlplane.process import LOOPBACK, wait_for
from testing.controlplane.server import ControlPlane
from testing.operator.harness import HOME, Jobs, OperatorProcess, build_job, running
from tests.operator.conftest import NewOperator

pytestmark = pytest.mark.cluster

HOSTS = ("coordinator.finetune-system.svc",)
URL = "https://coordinator.finetune-system.svc:8443"


@pytest.fixture
def operator(jobs: Jobs, new_operator: NewOperator) -> OperatorProcess:
    secret = f"tls-{jobs.namespace}"
    return new_operator(f"--coordinator-tls-secret={secret}", f"--coordinator-url={URL}")


def handshake(operator: OperatorProcess, authority: str) -> str:
    """Return the certificate that the coordinator presents to a client that trusts this authority."""
    context = ssl.create_default_context(cadata=authority)
    with (
        socket.create_connection((LOOPBACK, operator.coordinator_port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=HOSTS[0]) as secure,
    ):
        return ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True) or b"")


def authority_of(jobs: Jobs) -> str:
    config: dict[str, Any] = jobs.control_plane.api.get(f"/api/v1/namespaces/{jobs.namespace}/configmaps/circles-run")
    authority: str = config["data"].get("ca.crt", "")
    return authority


def secret_path(jobs: Jobs) -> str:
    return f"/api/v1/namespaces/{HOME}/secrets/tls-{jobs.namespace}"


def stored(control_plane: ControlPlane, path: str) -> TlsMaterial:
    data = {name: base64.b64decode(text).decode() for name, text in control_plane.api.get(path)["data"].items()}
    material = from_secret(data)
    assert material is not None
    return material


def store_material(control_plane: ControlPlane, path: str, material: TlsMaterial) -> None:
    data = {name: base64.b64encode(text.encode()).decode() for name, text in to_secret(material).items()}
    control_plane.api.patch(path, {"data": data})


def test_running_pods_get_the_authority_and_its_successor(operator: OperatorProcess, jobs: Jobs) -> None:
    cluster, path = jobs.control_plane, secret_path(jobs)
    with running(operator):
        jobs.create(build_job("circles"))
        wait_for("its pods exist", lambda: len(jobs.pods()) == 2)
        first = authority_of(jobs)
        assert handshake(operator, first) == stored(cluster, path).server.certificate
        pod = jobs.pods()["circles-a1-n0"]
        sources = next(one for one in pod["spec"]["volumes"] if one["name"] == "token")["projected"]["sources"]
        assert sources[1]["configMap"]["name"] == "circles-run"
    # Replace it by an authority that is due for renewal.
    now = datetime.now(UTC)
    aged = renew(None, HOSTS, now - AUTHORITY_LIFETIME * 0.8)
    store_material(cluster, path, aged)
    with running(operator):
        material = stored(cluster, path)
        assert material.signer == aged.signer
        assert material.successor is not None
        wait_for("the job's pods trust the successor", lambda: authority_of(jobs) == material.bundle)
        assert handshake(operator, aged.bundle) == material.server.certificate
    # After the overlap the successor signs (here: immediately), and a pod with the previous bundle trusts it.
    successor = material.successor
    rotated = TlsMaterial(successor, new_certificate(successor, HOSTS, now), None, (material.signer.certificate,))
    store_material(cluster, path, rotated)
    with running(operator):
        presented = handshake(operator, material.bundle)
    assert x509.load_pem_x509_certificate(presented.encode()).issuer == successor.parsed.subject
    assert jobs.status("circles")["attempt"] == 1


def test_a_secret_that_was_deleted_and_created_again_gets_the_same_authority(jobs: Jobs) -> None:
    """`helm upgrade` creates it empty. Running pods trust the authority that they got before."""
    cluster, name = jobs.control_plane, f"kept-{jobs.namespace}"
    path = f"/api/v1/namespaces/{HOME}/secrets"

    async def check() -> None:
        client = await connect(cluster.kubeconfig)
        clock = ServerClock()
        try:
            manager = CertificateManager(KubeApi(client, clock), HOME, name, HOSTS, clock)
            await manager.load()
            before = stored(cluster, f"{path}/{name}")
            cluster.api.delete(f"{path}/{name}")
            cluster.api.create(path, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}})
            await manager.load()
            assert stored(cluster, f"{path}/{name}") == before
            assert manager.bundle == before.bundle
        finally:
            await client.close()

    asyncio.run(check())


def test_authority_from_a_file_reaches_the_pods(jobs: Jobs, new_operator: NewOperator) -> None:
    cluster = jobs.control_plane
    certificate = cluster.authority.issue("coordinator-file", hosts=HOSTS)
    operator = new_operator(
        f"--coordinator-tls-cert={certificate.certificate}",
        f"--coordinator-tls-key={certificate.key}",
        f"--coordinator-ca={cluster.authority.certificate}",
        f"--coordinator-url={URL}",
    )
    with running(operator):
        jobs.create(build_job("circles"))
        wait_for("its pods exist", lambda: len(jobs.pods()) == 2)
        assert authority_of(jobs) == cluster.authority.certificate.read_text()
        assert handshake(operator, authority_of(jobs))
