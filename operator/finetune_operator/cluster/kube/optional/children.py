"""The caches of optional objects of jobs, such as PodGroups, and the requests that delete them.

`KubeCluster` delegates to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune_operator.api import gangs, labels
from finetune_operator.api.job import SchedulingMode
from finetune_operator.cluster.kube.client.client import CONFLICT, NOT_FOUND, ApiError, Json, KubeApi
from finetune_operator.cluster.kube.client.objects import KubeChild, Resource, decode_child
from finetune_operator.cluster.kube.watch.cache import Cache, ChangeListener
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.manifests import disruption_budget
from finetune_operator.plan.model.types import ObservedChild
from finetune_operator.settings import Settings

PLURALS = {gangs.POD_GROUP: "podgroups", disruption_budget.KIND: "poddisruptionbudgets"}
"""Optional kinds."""
_GANGS = tuple(gangs.SERVED_VERSIONS.items())
KINDS = {plural: kind for kind, plural in PLURALS.items()}


def optional_resources(settings: Settings) -> tuple[tuple[Resource, ...], ...]:
    """Return the resources that the settings allow: one group for each API, the preferred version first."""
    found: list[tuple[Resource, ...]] = []
    if settings.gangs:
        found += [
            tuple(resource_of(version, gangs.POD_GROUP) for version in versions)
            for versions in gangs.SERVED_VERSIONS.values()
        ]
    if settings.disruption_budgets:
        found.append((resource_of(disruption_budget.API_VERSION, disruption_budget.KIND),))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class KubeOptional:
    """An optional object of a job."""

    job: JobKey
    owner_uid: str
    observed: ObservedChild


Child = KubeChild | KubeOptional


class OptionalChildren:
    """Optional objects of each API that the API server serves."""

    def __init__(self, api: KubeApi, changed: ChangeListener[KubeOptional], wake_all: Callable[[], None]) -> None:
        self._api = api
        self._changed = changed
        self._wake_all = wake_all
        self._caches: dict[str, Cache[KubeOptional]] = {}
        """By API version."""
        self._synced: set[str] = set()

    def add(self, resource: Resource) -> Cache[KubeOptional]:
        """Return the cache of a resource that the API server serves, to be filled by a reflector."""
        return self._caches.setdefault(api_version(resource), Cache(lambda child: child.job, self._changed))

    def set_synced(self, resource: Resource) -> None:
        """Record that the cache of a resource is complete."""
        self._synced.add(api_version(resource))
        self._wake_all()

    def cache(self, version: str) -> Cache[KubeOptional]:
        """Return the cache of an API version."""
        return self._caches[version]

    def gang_apis(self) -> dict[SchedulingMode, str]:
        """Return the served API version of each kind of PodGroup."""
        served = {
            mode: [each for each in known if each in self._synced] for mode, known in gangs.SERVED_VERSIONS.items()
        }
        return {mode: versions[0] for mode, versions in served.items() if versions}

    @property
    def served(self) -> frozenset[str]:
        """The API versions that are served, and whose objects are known."""
        return frozenset(self._synced)

    def of_job(self, key: JobKey, uid: str) -> tuple[ObservedChild, ...]:
        """Return the objects of a job."""
        found = (child for cache in self._caches.values() for child in cache.group(key))
        return tuple(child.observed for child in found if child.owner_uid == uid)

    async def delete(self, namespace: str, child: ObservedChild) -> None:
        """Delete an object."""
        path = resource_of(child.api_version, child.kind).path(namespace, child.name)
        try:
            await self._api.delete(path, {"preconditions": {"uid": child.uid}})
        except ApiError as error:
            if error.status not in (CONFLICT, NOT_FOUND):
                raise


def resource_of(version: str, kind: str) -> Resource:
    """Return the resource of an optional kind."""
    return Resource(f"/apis/{version}", PLURALS[kind])


def api_version(resource: Resource) -> str:
    """Return the API version of a resource that is not in the core group."""
    return resource.root.removeprefix("/apis/")


def decoder(version: str, kind: str) -> Callable[[Json], KubeOptional | None]:
    """Return a function that reads the metadata of an object.

    It returns None if the object belongs to no job, or is being deleted: Kubernetes keeps a PodGroup until its last pod
    has ended.
    """

    def decode(thing: Json) -> KubeOptional | None:
        child, own = decode_child(thing), thing["metadata"].get("labels") or {}
        if child is None or thing["metadata"].get("deletionTimestamp") or not own.get(labels.ATTEMPT, "").isdecimal():
            return None
        observed = ObservedChild(version, kind, child.name, thing["metadata"]["uid"], int(own[labels.ATTEMPT]))
        return KubeOptional(child.job, child.owner_uid, observed)

    return decode
