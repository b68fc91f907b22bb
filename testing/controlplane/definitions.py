"""CustomResourceDefinitions of a control plane for tests."""

from __future__ import annotations

from testing.controlplane.process import wait_for
from testing.controlplane.server import ControlPlane

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def await_established(control_plane: ControlPlane, name: str) -> None:
    """Wait until a definition is served. `kubectl wait` fails if the definition has no conditions yet."""
    wait_for(f"{name} is established", lambda: _is_established(control_plane, name))


def _is_established(control_plane: ControlPlane, name: str) -> bool:
    conditions = (control_plane.api.get(f"{CRDS}/{name}").get("status") or {}).get("conditions") or ()
    return any(each["type"] == "Established" and each["status"] == "True" for each in conditions)
