"""A control plane on the loopback interface: etcd, kube-apiserver, kube-controller-manager, kube-scheduler and kwok.

Called by the pytest fixtures, by `python -m testing.controlplane` and by benchmarks:

    with ControlPlane() as cp:
        cp.add_nodes(3, gpus=8)
        print(cp.kubectl("get", "nodes"))

It needs neither root nor a network except 127.0.0.1, and leaves nothing behind, even if its process is killed.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from testing.controlplane import commands, nodes
from testing.controlplane.api import Api, ControlPlaneApiError, client_context
from testing.controlplane.build import ensure_programs
from testing.controlplane.pki import Authority, signing_key
from testing.controlplane.process import LOOPBACK, ControlPlaneError, Guard, Program, free_ports, wait_for

COMPONENTS = frozenset({"kube-controller-manager", "kube-scheduler", "kwok"})
"""Components that may run in addition to etcd and the API server."""

READY_SECONDS = 60.0
KUBECTL_SECONDS = 60.0
API_SERVER_HOSTS = (LOOPBACK, "localhost", "kubernetes.default.svc", "10.96.0.1")
# Client certificates by the name of their kubeconfig: user and groups.
USERS: Mapping[str, tuple[str, Sequence[str]]] = {
    "admin": ("admin", ["system:masters"]),
    "kube-controller-manager": ("system:kube-controller-manager", []),
    "kube-scheduler": ("system:kube-scheduler", []),
    "kwok": ("kwok", ["system:masters"]),
}


class KubectlError(ControlPlaneError):
    """kubectl failed; the message contains its error output."""

    def __init__(self, arguments: Sequence[str], code: int, stderr: str) -> None:
        super().__init__(f"kubectl {' '.join(arguments)} failed with exit code {code}: {stderr}")
        self.code = code
        self.stderr = stderr


class ControlPlane:
    """A control plane. Use it as a context manager, or call `start` and `stop`."""

    def __init__(
        self,
        components: Collection[str] = COMPONENTS,
        *,
        folder: Path | None = None,
        toleration_seconds: int = 1,
        audit: bool = False,
        features: Sequence[str] = (),
        apis: Sequence[str] = (),
    ) -> None:
        """Prepare a control plane without starting it.

        components: what to run in addition to etcd and the API server, out of COMPONENTS.
        folder: for logs, keys and data; all but the data is kept at the end. Default: a temporary folder.
        toleration_seconds: how long a pod stays on a lost node if it sets no toleration itself (Kubernetes: 300).
        audit: write one line of JSON per request, see `requests`.
        features: feature gates of the API server, the scheduler and the controllers to enable.
        apis: API versions to serve that are not served by default, for example scheduling.k8s.io/v1alpha2.
        """
        unknown = set(components) - COMPONENTS
        if unknown:
            raise ValueError(f"unknown components {sorted(unknown)}: write some of {sorted(COMPONENTS)}")
        self._components = frozenset(components)
        self._toleration_seconds = toleration_seconds
        self._audit = audit
        self._features, self._apis = tuple(features), tuple(apis)
        self._keep = folder is not None
        self.folder = folder.absolute() if folder else Path(tempfile.mkdtemp(prefix="control-plane-"))
        self._numbers = itertools.count()
        self._guard: Guard | None = None
        self._programs: dict[str, Program] = {}

    # --- lifecycle ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Start and wait until it serves; raise ControlPlaneError with the end of the logs if it does not."""
        try:
            self._prepare()
            self._run("etcd", "kube-apiserver")
            self._wait_until_ready()
            self._run(*sorted(self._components))
            if "kube-controller-manager" in self._components:
                self._wait("the default service account exists", lambda: self._has_service_account("default"))
        except BaseException:
            self._end()
            raise
        return self

    def stop(self) -> None:
        """Stop all programs and delete the data; logs, keys and kubeconfigs are kept if a folder was given."""
        self._end()
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)
        if not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def stop_api_server(self, with_signal: signal.Signals = signal.SIGKILL) -> None:
        """Stop the API server; its clients' connections break.

        The components are stopped too, and `start_api_server` starts them: they cannot work without it and would
        reconnect late. kwok loses its pending work when its connection breaks, and the others retry only after half a
        minute or more; in a real cluster they would have lost their leases and restarted.
        """
        for name in self._components:
            self._programs[name].stop()
        self._programs["kube-apiserver"].stop(with_signal)

    def start_api_server(self) -> None:
        """Start the API server at the same address, and the components; return when it serves."""
        self._programs["kube-apiserver"].start()
        self._wait_until_ready()
        for name in self._components:
            self._programs[name].start()

    @contextlib.contextmanager
    def refuse_tokens(self) -> Iterator[None]:
        """Make the API server refuse all tokens (401) in the block, as one that has just started may do."""
        original = self._tokens.certificate.read_text()
        try:
            self.stop_api_server()
            other = signing_key(self.folder / "pki", "other")
            self._tokens.certificate.write_text(other.certificate.read_text())
            self.start_api_server()
            yield
        finally:
            self.stop_api_server()
            self._tokens.certificate.write_text(original)
            self.start_api_server()

    def program(self, name: str) -> Program:
        """Return one of the programs, for a test that stops, pauses or restarts it."""
        return self._programs[name]

    @property
    def programs(self) -> list[Program]:
        """All programs, in the order of their start."""
        return list(self._programs.values())

    def _prepare(self) -> None:
        """Create the folder, the certificates, the configuration files and the programs' commands."""
        etcd_port, peer_port, api_port = free_ports(3)
        layout = self._layout = commands.Layout(self.folder, ensure_programs(), etcd_port, peer_port, api_port)
        # Data of a killed control plane in the same folder.
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)
        layout.audit_log.unlink(missing_ok=True)
        for name in ("logs", "kubeconfigs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.authority = Authority(self.folder / "pki", "test-bed")
        front = Authority(self.folder / "pki" / "front-proxy", "test-bed-front-proxy")
        self._tokens = signing_key(self.folder / "pki", "tokens")
        credentials = commands.Credentials(
            authority=self.authority.certificate,
            authority_key=self.authority.key,
            api_server=self.authority.issue("kube-apiserver", hosts=API_SERVER_HOSTS),
            tokens=self._tokens,
            front_proxy_authority=front.certificate,
            front_proxy=front.issue("front-proxy-client"),
        )
        users = {name: self.authority.issue(user, groups=groups) for name, (user, groups) in USERS.items()}
        for name, client in users.items():
            self._write_kubeconfig(layout.kubeconfig(name), commands.certificate_user(client))
        self.api = Api(api_port, client_context(self.authority.certificate, users["admin"]))
        layout.scheduler_config.write_text(json.dumps(commands.scheduler_configuration(layout)))
        layout.audit_policy.write_text(json.dumps(commands.audit_policy()))
        self._commands = {
            "etcd": commands.etcd_command(layout),
            "kube-apiserver": commands.api_server_command(
                layout,
                credentials,
                toleration_seconds=self._toleration_seconds,
                audit=self._audit,
                features=self._features,
                apis=self._apis,
            ),
            "kube-controller-manager": commands.controller_manager_command(layout, credentials, self._features),
            "kube-scheduler": commands.scheduler_command(layout, self._features),
            "kwok": commands.kwok_command(layout, nodes.MANAGED_LABEL),
        }
        self._guard = Guard(None if self._keep else self.folder)

    def _run(self, *names: str) -> None:
        assert self._guard is not None
        for name in names:
            self._programs[name] = Program(name, self._commands[name], self._layout.log(name), self._guard)
            self._programs[name].start()

    def _end(self) -> None:
        """Kill the guard's process group, and with it all programs."""
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        for program in self._programs.values():
            program.stop()

    def _wait_until_ready(self) -> None:
        self._wait("the API server is ready", self._is_ready)

    def _is_ready(self) -> bool:
        try:
            return bool(self.api.get("/readyz") == "ok")
        except (OSError, ControlPlaneApiError):
            return False

    def _has_service_account(self, namespace: str) -> bool:
        try:
            return bool(self.api.get(f"/api/v1/namespaces/{namespace}/serviceaccounts/default"))
        except ControlPlaneApiError as error:
            if error.code != 404:
                raise
            return False

    def _wait(self, what: str, probe: Callable[[], object]) -> None:
        """Wait for a probe; if a program exits or the time is over, raise an error with the end of all logs."""

        def check() -> bool:
            if any(program.has_exited for program in self.programs):
                raise ControlPlaneError(f"a program exited during: {what}")
            return bool(probe())

        try:
            wait_for(what, check, READY_SECONDS)
        except (ControlPlaneError, TimeoutError) as error:
            raise ControlPlaneError(f"{error}\n{self.tails()}") from None

    def tails(self) -> str:
        """Return the last lines of every log."""
        return "\n".join(line for program in self.programs for line in program.tail())

    # --- users -------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """URL of the API server."""
        return self._layout.api_url

    @property
    def kubeconfig(self) -> Path:
        """Kubeconfig of the administrator."""
        return self._layout.kubeconfig("admin")

    def kubeconfig_for(self, service_account: str, namespace: str, expiration_seconds: int = 3600) -> Path:
        """Return a kubeconfig of an existing service account with a new token, for tests of its role."""
        token = self.token_for(service_account, namespace, expiration_seconds=expiration_seconds)
        path = self._layout.kubeconfig(f"{namespace}-{service_account}-{next(self._numbers)}")
        self._write_kubeconfig(path, {"token": token}, namespace)
        return path

    def token_for(
        self,
        service_account: str,
        namespace: str,
        *,
        audiences: Sequence[str] = (),
        pod: Mapping[str, Any] | None = None,
        expiration_seconds: int = 3600,
    ) -> str:
        """Return a token by TokenRequest; with `pod` (an API object), one that is bound to that pod.

        Without audiences, it is for the API server. The API server issues no tokens with a lifetime below 600 s.
        """
        spec: dict[str, Any] = {"audiences": list(audiences), "expirationSeconds": expiration_seconds}
        if pod is not None:
            name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{service_account}/token"
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        token: str = self.api.create(path, request)["status"]["token"]
        return token

    def api_for(self, service_account: str, namespace: str) -> Api:
        """Return an API client of a service account."""
        return self.api_with_token(self.token_for(service_account, namespace))

    def api_with_token(self, token: str) -> Api:
        """Return an API client with a given token, valid or not."""
        return Api(self._layout.api_port, client_context(self.authority.certificate), token)

    def kubectl(
        self,
        *arguments: str,
        stdin: str | None = None,
        kubeconfig: Path | None = None,
        timeout_seconds: float = KUBECTL_SECONDS,
    ) -> str:
        """Return the output of kubectl, as administrator or with another kubeconfig; raise KubectlError on failure."""
        result = subprocess.run(
            [str(self._layout.programs["kubectl"]), *arguments],
            env={**os.environ, "KUBECONFIG": str(kubeconfig or self.kubeconfig), "KUBECACHEDIR": str(self._cache)},
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        if result.returncode != 0:
            raise KubectlError(arguments, result.returncode, result.stderr)
        return result.stdout

    @property
    def kubectl_path(self) -> Path:
        """Path of the kubectl of the same version."""
        return self._layout.programs["kubectl"]

    @property
    def _cache(self) -> Path:
        return self.folder / "kubectl-cache"

    def _write_kubeconfig(self, path: Path, user: dict[str, Any], namespace: str = "default") -> None:
        path.touch(mode=0o600)
        path.write_text(commands.kubeconfig(self._layout.api_url, self.authority.certificate, user, namespace))

    # --- objects -----------------------------------------------------------------------------------------------------

    def create_namespace(self, name: str, labels: Mapping[str, str] | None = None) -> str:
        """Create a namespace and wait until pods can be created in it; return its name."""
        metadata = {"name": name, "labels": dict(labels or {})}
        self.api.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        if "kube-controller-manager" in self._components:
            self._wait(f"namespace {name} has its service account", lambda: self._has_service_account(name))
        return name

    def add_nodes(
        self,
        count: int,
        *,
        prefix: str = "node",
        cpu: str = "64",
        memory: str = "256Gi",
        gpus: int = 0,
        labels: Mapping[str, str] | None = None,
        taints: Iterable[Mapping[str, str]] = (),
        timeout_seconds: float = READY_SECONDS,
    ) -> list[str]:
        """Add kwok nodes and wait until pods can be scheduled to them; return their names."""
        taints = list(taints)
        names = [f"{prefix}-{next(self._numbers)}" for _ in range(count)]
        for name in names:
            node = nodes.build_node(name, cpu=cpu, memory=memory, gpus=gpus, labels=labels or {}, taints=taints)
            self.api.create(nodes.NODES_PATH, node)
        nodes.wait_until_usable(self.api, names, timeout_seconds)
        return names

    def delete_nodes(self, names: Iterable[str]) -> None:
        """Delete nodes, as a cloud does after it has stopped machines; the controllers handle the pods."""
        for name in names:
            self.api.delete(f"{nodes.NODES_PATH}/{name}")

    def hang_kubelet(self, name: str) -> None:
        """Make a node's kubelet hang: its pods keep their state, and deleted ones stay terminating."""
        nodes.hang_kubelet(self.api, name)

    def lose_node(self, name: str) -> None:
        """Lose a node: its status is unknown, it is tainted, and its deleted pods stay terminating."""
        nodes.lose(self.api, name, datetime.datetime.now(datetime.UTC))

    def recover_node(self, name: str) -> None:
        """Recover a lost node or a hanging kubelet; return when pods can be scheduled to the node."""
        nodes.recover(self.api, name)
        nodes.wait_until_usable(self.api, [name], READY_SECONDS)

    def compact_etcd(self) -> int:
        """Delete all revisions except the last one; return that one.

        The API server answers watches from its memory. So a watch or a paginated list from an older revision fails with
        410 only after the API server has been restarted, too (see `expire_watches`).
        """
        revision = int(self._request_etcd("range", {"key": "AA=="})["header"]["revision"])
        self._request_etcd("compaction", {"revision": str(revision), "physical": True})
        return revision

    def expire_watches(self) -> None:
        """Break every watch, and answer 410 to clients that want to continue theirs."""
        self.stop_api_server()
        # One more change is needed: a client at the newest revision could continue.
        self._request_etcd("put", {"key": "L3Rlc3QtYmVk", "value": ""})
        self.compact_etcd()
        self.start_api_server()

    def _request_etcd(self, method: str, body: dict[str, Any]) -> Any:
        """Call etcd's JSON gateway; keys are in base64."""
        request = urllib.request.Request(f"{self._layout.etcd_url}/v3/kv/{method}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=KUBECTL_SECONDS) as response:
            return json.load(response)

    # --- audit log ---------------------------------------------------------------------------------------------------

    def requests(self, user: str = "") -> list[dict[str, Any]]:
        """Return the finished requests of all users or of one, from the audit log (requires `audit=True`).

        Each has the fields verb, requestURI, objectRef and so on. The user name of a service account is
        `system:serviceaccount:<namespace>:<name>`. Watches are included once they have ended.
        """
        if not self._layout.audit_log.exists():
            return []
        # The last line may be incomplete.
        lines = self._layout.audit_log.read_text().split("\n")[:-1]
        events = (json.loads(line) for line in lines if user in line)
        # Unauthenticated requests have no user name.
        return [event for event in events if user in ("", event["user"].get("username"))]
