"""Checks a job against the cluster of a kubeconfig. It creates nothing: creates are dry runs.

What the user may not read is not checked, and a note says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

from finetune_operator.api import gangs, kueue
from finetune_operator.api.job import GROUP, PLURAL, VERSION, FineTuneJob
from finetune_operator.api.names import CONTAINER
from finetune_operator.api.quantity import parse_quantity
from finetune_operator.cluster.kube.client.client import CONFLICT, JSON, NOT_FOUND, PARTIAL, ApiError
from finetune_operator.cluster.kube.client.refusals import describe_unserved
from finetune_operator.manifests import build_pod, num_nodes
from finetune_operator.plan.policies.acceptance import NO_KUEUE, describe_missing_groups
from finetune_operator.settings import Settings

Object = Mapping[str, Any]
FORBIDDEN = 403
MANY_WRITERS = "ReadWriteMany"
COUNTED = ("cpu", "memory", "ephemeral-storage")
"""Resources that a quota names both with and without the prefix 'requests.'."""


class Reader(Protocol):
    """The requests that the checks make; `KubeApi` has them."""

    async def request(
        self, method: str, path: str, body: Any = None, *, query: Mapping[str, str] | None = None, accept: str = JSON
    ) -> dict[str, Any]:
        """Send one request; see `KubeApi.request`."""
        ...


@dataclass
class ClusterReport:
    """The result of the checks: messages, each with its field at the start."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ClusterCheck:
    """The checks of one job.

    Attributes:
        api: sends the requests.
        job: the job, with the paths of its manifest.
        manifest: the job as the user wrote it.
        siblings: further objects of the manifest's file, such as its PersistentVolumeClaim.
    """

    api: Reader
    job: FineTuneJob
    manifest: Object
    siblings: Sequence[Object] = ()
    report: ClusterReport = field(default_factory=ClusterReport)

    async def run(self) -> ClusterReport:
        """Make all checks and return the result.

        Raises:
            ApiError: the API server does not answer.
        """
        await self._check_namespace()
        await self._check_job()
        pod = build_pod(self.job, 1, 0, Settings())
        await self._check_claim()
        await self._check_names()
        await self._check_queue()
        await self._check_gangs()
        await self._check_pod(pod)
        requested = requests_of(pod)
        await self._check_quota(requested)
        await self._check_nodes(requested)
        return self.report

    @property
    def _namespace(self) -> str:
        return self.job.metadata.namespace

    async def _check_namespace(self) -> None:
        path = f"/api/v1/namespaces/{self._namespace}"
        await self._get(path, f"metadata.namespace: {self._namespace}", "create it, or write another namespace")

    async def _check_job(self) -> None:
        """Let the API server check the job: the CRD's rules, and the admission policies of the cluster."""
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{self._namespace}/{PLURAL}"
        meta = {**self.manifest.get("metadata", {}), "namespace": self._namespace}
        await self._try_to_create(path, {**self.manifest, "metadata": meta}, "the job")

    async def _check_pod(self, pod: dict[str, Any]) -> None:
        """Let the API server check a pod: podTemplate, Pod Security, LimitRange and other admission."""
        del pod["metadata"]["ownerReferences"]
        await self._try_to_create(f"/api/v1/namespaces/{self._namespace}/pods", pod, "its pods")

    async def _try_to_create(self, path: str, manifest: Object, what: str) -> None:
        query = {"dryRun": "All", "fieldValidation": "Strict"}
        try:
            await self.api.request("POST", path, manifest, query=query, accept=PARTIAL)
        except ApiError as error:
            if error.status == NOT_FOUND and what == "the job":
                if "namespaces" not in error.message:
                    self.report.problems.append(
                        f"kind: the cluster has no {PLURAL}.{GROUP}; install the operator's chart"
                    )
            elif error.status == FORBIDDEN and "cannot create resource" in error.message:
                self.report.warnings.append(f"{what} could not be checked: {error.message}")
            elif error.status in (400, FORBIDDEN, 422):
                unserved = describe_unserved(self.job, error.message) if what == "its pods" else None
                self.report.problems.append(unserved or f"{what}: the API server refuses: {error.message}")
            elif error.status not in (CONFLICT, NOT_FOUND):
                raise

    async def _check_claim(self) -> None:
        storage = self.job.spec.checkpoint.storage
        if storage is None or storage.persistent_volume_claim is None:
            return
        name = storage.persistent_volume_claim.claim_name
        what = "spec.checkpoint.storage.persistentVolumeClaim.claimName"
        claim: Object | None = next((one for one in self.siblings if _is_claim(one, name)), None)
        if claim is None:
            path = f"/api/v1/namespaces/{self._namespace}/persistentvolumeclaims/{name}"
            claim = await self._get(path, f"{what}: {name}", "create the claim, or write another one")
        if claim is None:
            return
        spec = claim.get("spec") or {}
        if num_nodes(self.job.spec) > 1 and MANY_WRITERS not in (spec.get("accessModes") or ()):
            self.report.problems.append(
                f"{what}: {name} is not {MANY_WRITERS}, and the {num_nodes(self.job.spec)} pods of the job may run on "
                f"several nodes; write a claim with accessModes: [{MANY_WRITERS}]"
            )
        if (storage_class := spec.get("storageClassName")) and not spec.get("volumeName"):
            path = f"/apis/storage.k8s.io/v1/storageclasses/{storage_class}"
            await self._get(path, f"{what}: the storage class {storage_class} of {name}", "write an existing one")

    async def _check_names(self) -> None:
        """Check the other objects that the spec names. Of Secrets, only the metadata are read."""
        spec = self.job.spec
        if name := spec.priority_class_name:
            path = f"/apis/scheduling.k8s.io/v1/priorityclasses/{name}"
            await self._get(path, f"spec.priorityClassName: {name}", "create it, or leave priorityClassName out")
        if name := spec.topology.gpu_claim_template_name:
            path = f"/apis/resource.k8s.io/v1/namespaces/{self._namespace}/resourceclaimtemplates/{name}"
            field = f"spec.topology.gpuClaimTemplateName: {name}"
            remedy = "create the ResourceClaimTemplate, or leave gpuClaimTemplateName out"
            await self._get(path, field, remedy)
        for number, secret in enumerate(spec.secrets):
            path = f"/api/v1/namespaces/{self._namespace}/secrets/{secret.name}"
            await self._get(path, f"spec.secrets[{number}].name: {secret.name}", "create the Secret", PARTIAL)
        for number, output in enumerate(spec.outputs):
            if output.secret is not None:
                path = f"/api/v1/namespaces/{self._namespace}/secrets/{output.secret.name}"
                field = f"spec.outputs[{number}].secret.name: {output.secret.name}"
                await self._get(path, field, "create the Secret", PARTIAL)

    async def _check_queue(self) -> None:
        """Check that the queue exists, and that the cluster has Kueue."""
        queue = kueue.queue_of(self.job)
        if queue is None:
            return
        field = "spec.queueName" if self.job.spec.queue_name else f"the label {kueue.QUEUE_LABEL}"
        try:
            await self.api.request("GET", f"/apis/{kueue.API_VERSION}")
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise
            self.report.problems.append(f"{field}: {NO_KUEUE}")
            return
        path = f"/apis/{kueue.API_VERSION}/namespaces/{self._namespace}/localqueues/{queue}"
        await self._get(path, f"{field}: {queue}", "create the LocalQueue, or name an existing one")

    async def _check_gangs(self) -> None:
        """Check that the cluster serves the requested PodGroup."""
        mode = self.job.spec.scheduling
        for version in gangs.SERVED_VERSIONS.get(mode, ()):
            try:
                found = await self.api.request("GET", f"/apis/{version}")
            except ApiError as error:
                if error.status != NOT_FOUND:
                    raise
                continue
            if any(each["name"] == "podgroups" for each in found.get("resources") or ()):
                return
        if mode in gangs.SERVED_VERSIONS:
            self.report.problems.append(describe_missing_groups(mode))

    async def _check_quota(self, requested: Mapping[str, Decimal]) -> None:
        path = f"/api/v1/namespaces/{self._namespace}/resourcequotas"
        quotas = await self._get(path, "the quotas", "")
        for quota in (quotas or {}).get("items") or ():
            problems, warnings = compare_quota(quota, requested, num_nodes(self.job.spec))
            self.report.problems += problems
            self.report.warnings += warnings

    async def _check_nodes(self, requested: Mapping[str, Decimal]) -> None:
        nodes = await self._get("/api/v1/nodes", "the nodes", "")
        if nodes is not None and (missing := find_unavailable(nodes.get("items") or (), requested)):
            name, amount = missing
            self.report.warnings.append(
                f"spec.topology: no node offers {name}: {amount}, which a pod requests; pods wait until such a node is "
                "added"
            )

    async def _get(self, path: str, what: str, remedy: str, accept: str = JSON) -> dict[str, Any] | None:
        """Return an object. If it does not exist, report a problem; if it may not be read, report a warning."""
        try:
            return await self.api.request("GET", path, accept=accept)
        except ApiError as error:
            if error.status == NOT_FOUND:
                self.report.problems.append(f"{what} does not exist in the cluster; {remedy}")
            elif error.status == FORBIDDEN:
                self.report.warnings.append(f"{what} could not be checked: {error.message}")
            else:
                raise
        return None


def requests_of(pod: Object) -> dict[str, Decimal]:
    """Return the sums of the resources that the containers of a pod request; extended resources have only limits."""
    found: dict[str, Decimal] = {}
    for container in pod["spec"]["containers"]:
        resources = container.get("resources") or {}
        amounts = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        for name, amount in amounts.items():
            found[name] = found.get(name, Decimal(0)) + parse_quantity(str(amount))
    assert any(container["name"] == CONTAINER for container in pod["spec"]["containers"])
    return found


def compare_quota(quota: Object, requested: Mapping[str, Decimal], num_pods: int) -> tuple[list[str], list[str]]:
    """Return the problems and the warnings of a quota: what never fits, and what does not fit now.

    Args:
        quota: a ResourceQuota. One with scopes is not compared: it may not apply to these pods.
        requested: resources of one pod.
        num_pods: number of pods of the gang.
    """
    spec = quota.get("spec") or {}
    problems: list[str] = []
    warnings: list[str] = []
    if spec.get("scopes") or spec.get("scopeSelector"):
        return problems, warnings
    used = (quota.get("status") or {}).get("used") or {}
    for name, text in (spec.get("hard") or {}).items():
        resource = name.removeprefix("requests.")
        is_pods = resource in ("pods", "count/pods")
        if not is_pods and (resource not in requested or (name == resource and resource not in COUNTED)):
            continue
        needed = Decimal(num_pods) if is_pods else requested[resource] * num_pods
        hard, free = parse_quantity(str(text)), parse_quantity(str(text)) - parse_quantity(str(used.get(name, "0")))
        amount = f"the {num_pods} pods request {needed:f} of {name}"
        label = f"ResourceQuota {quota['metadata']['name']}"
        if needed > hard:
            problems.append(f"spec.topology: {amount}, and {label} allows {text}; request less, or raise the quota")
        elif needed > free:
            warnings.append(f"spec.topology: {amount}, and {label} has {free:f} left; the job waits for the rest")
    return problems, warnings


def find_unavailable(nodes: Iterable[Object], requested: Mapping[str, Decimal]) -> tuple[str, str] | None:
    """Return a resource, with its amount, of which no single node offers as much as a pod requests; None: all fit."""
    offered = [(node.get("status") or {}).get("allocatable") or {} for node in nodes]
    for name, amount in requested.items():
        if not any(parse_quantity(str(one.get(name, "0"))) >= amount for one in offered):
            return name, f"{amount:f}"
    return None


def _is_claim(document: Object, name: str) -> bool:
    return document.get("kind") == "PersistentVolumeClaim" and (document.get("metadata") or {}).get("name") == name
