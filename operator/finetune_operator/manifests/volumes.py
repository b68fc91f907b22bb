"""Volumes of a pod and their mounts: storage, cache, run specification, token, scratch."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.job import FineTuneJob, FineTuneJobSpec, ModelImage, TopologySpec
from finetune_operator.api.names import config_name
from finetune_operator.api.storage import StorageSpec
from finetune_operator.manifests import layout
from finetune_operator.manifests.resources import grown_topology, shared_memory_size
from finetune_operator.settings import Settings

Volume = dict[str, Any]


def build_volumes(job: FineTuneJob, settings: Settings, node_rank: int = 0) -> list[tuple[Volume, dict[str, Any]]]:
    """Return each volume of the pod of a node rank, with its mount."""
    volumes = [
        _mounted("checkpoints", _storage(job.spec.checkpoint.storage), layout.STORAGE),
        _mounted("run", {"configMap": {"name": config_name(job.metadata.name)}}, layout.RUN, read_only=True),
        _mounted("shared-memory", _shared_memory(grown_topology(job)), layout.SHARED_MEMORY),
        _mounted("scratch", {"emptyDir": {}}, layout.SCRATCH),
    ]
    if scratch := job.spec.checkpoint.scratch:
        size = {"sizeLimit": scratch.size_limit} if scratch.size_limit else {}
        volumes.append(_mounted("node-disk", {"emptyDir": size}, layout.NODE_DISK))
    if image := job.spec.model.image:
        volumes.append(_mounted("model", _image(image), layout.MODEL, read_only=True))
    script = job.spec.training.script
    if script is not None and script.config_map is not None:
        config = script.config_map
        source = {"configMap": {"name": config.name, "items": [{"key": config.key, "path": config.key}]}}
        volumes.append(_mounted("script", source, layout.SCRIPT, read_only=True))
    if may_write_outputs(job.spec, node_rank):
        volumes += [
            _mounted(f"output-secret-{number}", {"secret": {"secretName": name}}, path, read_only=True)
            for number, (name, path) in enumerate(output_secrets(job.spec).items())
        ]
    if settings.cache_claim:
        volumes.append(_mounted("cache", _claim(settings.cache_claim), layout.CACHE))
    if settings.coordinator_url:
        volumes.append(_mounted("token", _token(job, settings), layout.TOKEN, read_only=True))
    return volumes


def output_secrets(spec: FineTuneJobSpec) -> dict[str, str]:
    """Return the Secrets of the outputs, each with the folder at which it is mounted."""
    names = (output.secret.name for output in spec.outputs if output.secret is not None)
    return {name: f"{layout.OUTPUT_SECRETS}/{name}" for name in names}


def may_write_outputs(spec: FineTuneJobSpec, node_rank: int) -> bool:
    """Return whether the pod of a node rank may have to write the outputs: only then it can read their Secrets.

    Rank 0 writes them. A kept pod keeps its rank, unless the gang changes its size or moves to standby pods.
    """
    spot = spec.recovery.spot
    changes = spec.topology.min_nodes is not None or (spot is not None and spot.fallback_after is not None)
    return node_rank == 0 or changes


def cache_dir(settings: Settings) -> str:
    """Return the folder that jobs share for latents, embeddings and files from the hub."""
    return layout.CACHE if settings.cache_claim else layout.CACHE_ON_STORAGE


def _mounted(name: str, source: dict[str, Any], path: str, *, read_only: bool = False) -> tuple[Volume, dict[str, Any]]:
    mount: dict[str, Any] = {"name": name, "mountPath": path}
    if read_only:
        mount["readOnly"] = True
    return {"name": name, **source}, mount


def _storage(storage: StorageSpec | None) -> dict[str, Any]:
    if storage is None:
        return {"emptyDir": {}}
    if storage.persistent_volume_claim is not None:
        return _claim(storage.persistent_volume_claim.claim_name)
    if storage.host_path is not None:
        return {"hostPath": {"path": storage.host_path.path, "type": "DirectoryOrCreate"}}
    if storage.nfs is not None:
        return {"nfs": {"server": storage.nfs.server, "path": storage.nfs.path}}
    # With a bucket, this volume contains only copies of objects and files that can be created again.
    return {"emptyDir": {}}


def _shared_memory(topology: TopologySpec) -> dict[str, Any]:
    return {"emptyDir": {"medium": "Memory", "sizeLimit": shared_memory_size(topology)}}


def _image(image: ModelImage) -> dict[str, Any]:
    policy = {"pullPolicy": image.pull_policy.value} if image.pull_policy else {}
    return {"image": {"reference": image.reference} | policy}


def _claim(name: str) -> dict[str, Any]:
    return {"persistentVolumeClaim": {"claimName": name}}


def _token(job: FineTuneJob, settings: Settings) -> dict[str, Any]:
    """Return the volume with a token for the coordinator only, and with the authority of its certificate."""
    sources: list[dict[str, Any]] = [
        {
            "serviceAccountToken": {
                "audience": settings.coordinator_audience,
                "expirationSeconds": settings.token_seconds,
                "path": layout.TOKEN_FILE,
            }
        }
    ]
    own = config_name(job.metadata.name) if settings.coordinator_ca_in_run else ""
    if config := settings.coordinator_ca_config or own:
        items = [{"key": layout.CA_FILE, "path": layout.CA_FILE}]
        sources.append({"configMap": {"name": config, "items": items}})
    return {"projected": {"sources": sources}}
