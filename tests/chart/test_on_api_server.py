"""A real API server accepts every object of the chart; its pods satisfy the restricted Pod Security Standard."""

from __future__ import annotations

import json
from typing import Any

import pytest

from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.server import ControlPlane
from testing.helm import HOME, Helm, Object, one

FOREIGN = {"ServiceMonitor", "PrometheusRule", "Certificate"}
"""Kinds whose CRDs are not installed."""
SCHEDULING = {
    "nodeSelector": {"pool": "system"},
    "tolerations": [{"key": "system", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "system-cluster-critical",
    "imagePullSecrets": [{"name": "registry"}],
    "podLabels": {"team": "ml"},
    "podAnnotations": {"note": "x"},
    "extraEnv": [{"name": "HTTPS_PROXY", "value": ""}],
    "topologySpreadConstraints": [
        {"maxSkew": 2, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {}}
    ],
    "resources": {"requests": {"cpu": "1"}},
}
TABLE: list[dict[str, Any]] = [
    {},
    {"namespaces": ["default"], "networkPolicy": {"jobNamespaces": ["default"]}, "watchNodes": False},
    {"namespaces": ["default"], "warnOtherNamespaces": False},
    {"coordinator": {"enabled": False}, "replicas": 1, "rbac": {"aggregate": False}},
    {"coordinator": {"tls": {"mode": "certManager", "issuerRef": {"name": "ca"}}}},
    {"coordinator": {"port": 9443, "tls": {"mode": "secret", "secretName": "given"}}, "flags": {"lease-seconds": 10}},
    {"storage": {"claims": [{"name": "ftj", "namespace": "default", "size": "1Ti", "annotations": {"a": "b"}}]}},
    {
        "metrics": {"port": 9000, "dashboard": {"enabled": True}, "serviceMonitor": {"enabled": True}},
        "networkPolicy": {"metricsFrom": [{"namespaceSelector": {}}], "apiServerCidrs": ["10.0.0.1/32"]},
    },
    SCHEDULING,
    {"networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}, "image": {"pullPolicy": "Never"}},
]


@pytest.mark.parametrize("values", TABLE, ids=range(len(TABLE)))
def test_the_api_server_accepts_every_object(helm: Helm, control_plane: ControlPlane, values: dict[str, Any]) -> None:
    objects = [thing for thing in helm.render(values, crds=True) if thing["kind"] not in FOREIGN]
    assert len(objects) > 10
    listed = {"apiVersion": "v1", "kind": "List", "items": objects}
    arguments = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "--output=name", "--filename=-")
    accepted = control_plane.kubectl(*arguments, stdin=json.dumps(listed)).split()
    assert len(accepted) == len(objects)


@pytest.mark.parametrize("values", [{}, SCHEDULING, {"coordinator": {"tls": {"mode": "secret", "secretName": "x"}}}])
def test_pods_satisfy_the_restricted_standard(helm: Helm, control_plane: ControlPlane, values: dict[str, Any]) -> None:
    """The namespace enforces the standard: a pod that may run as root is refused."""
    objects = helm.render(values)
    for name, spec in pods(objects).items():
        create(control_plane, name, spec)
        loose = {**spec, "securityContext": {**spec["securityContext"], "runAsNonRoot": False}}
        with pytest.raises(ControlPlaneApiError) as caught:
            create(control_plane, name, loose)
        assert "violates PodSecurity" in caught.value.message


def pods(objects: list[Object]) -> dict[str, dict[str, Any]]:
    return {"operator": one(objects, "Deployment")["spec"]["template"]["spec"], "test": one(objects, "Pod")["spec"]}


def create(control_plane: ControlPlane, name: str, spec: dict[str, Any]) -> None:
    plain = {key: value for key, value in spec.items() if key not in ("serviceAccountName", "priorityClassName")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": plain}
    control_plane.api.create(f"/api/v1/namespaces/{HOME}/pods?dryRun=All", pod)
