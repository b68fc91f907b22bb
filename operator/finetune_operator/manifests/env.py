"""The environment variables of the trainer (finetune_contract.environment) in a pod manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_contract import environment, paths
from finetune_contract.outputs.request import ExportRequest
from finetune_contract.run_spec import SpeedSettings
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import pod_host
from finetune_operator.api.storage import StorageSpec
from finetune_operator.manifests import layout
from finetune_operator.manifests.fabric import backend, fabric_env
from finetune_operator.manifests.run_spec import build_target
from finetune_operator.manifests.volumes import cache_dir, output_secrets
from finetune_operator.settings import Settings


@dataclass(frozen=True)
class PodSlot:
    """Position of a pod in a job: its attempt, its node rank and its gang."""

    attempt: int
    node_rank: int
    num_nodes: int
    """Number of pods in the gang."""
    first_pod: tuple[int, int]
    """Attempt and node rank in the name of node rank 0's pod, where the ranks meet."""
    is_standby: bool = False
    """Whether the pod is a standby pod, which waits to be assigned to a gang."""
    mtbf_seconds: float | None = None
    """Observed mean time between the job's interruptions; None: unknown."""
    checks_devices: bool = False
    """Whether its ranks check their devices before they train."""
    has_names: bool = False
    """Whether the ranks meet by the name of rank 0's pod, which the job's service gives it."""


def build_env(job: FineTuneJob, slot: PodSlot, settings: Settings) -> list[dict[str, Any]]:
    """Return all variables of the container `trainer` except those from Secrets."""
    values = {
        environment.RUN_SPEC: f"{layout.RUN}/{layout.RUN_SPEC_KEY}",
        environment.TARGET: build_target(job.spec).to_json(),
        environment.SPEED: SpeedSettings.of(job.spec.training).to_json(),
        environment.ATTEMPT: str(slot.attempt),
        **_gang(job, slot, settings),
        **_folders(job, settings),
        **_coordinator(settings),
        **_script(job),
        environment.GRACE_SECONDS: str(job.spec.recovery.notice_seconds),
        environment.TERMINATION_LOG: layout.TERMINATION_LOG,
        # The root file system is read-only: files that libraries write to the home folder go to scratch.
        "HOME": layout.SCRATCH,
        **fabric_env(job.spec.topology),
    }
    fields = {environment.POD_NAME: "metadata.name", environment.POD_UID: "metadata.uid"}
    name = pod_host(job.metadata.name, *slot.first_pod, job.metadata.namespace)
    if slot.has_names:
        values[environment.MASTER_ADDR] = name
    elif slot.first_pod == (slot.attempt, slot.node_rank):
        fields[environment.MASTER_ADDR] = "status.podIP"
    elif not slot.is_standby:
        values[environment.MASTER_NAME] = name
    return [{"name": name, "value": value} for name, value in values.items()] + [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()
    ]


def build_export_env(job: FineTuneJob, request: ExportRequest, settings: Settings) -> list[dict[str, Any]]:
    """Return all variables of the container of an export pod except those from Secrets."""
    values = {
        environment.RUN_SPEC: f"{layout.RUN}/{layout.RUN_SPEC_KEY}",
        environment.EXPORT: request.to_json(),
        **_folders(job, settings),
        environment.TERMINATION_LOG: layout.TERMINATION_LOG,
        "HOME": layout.SCRATCH,
    }
    return [{"name": name, "value": value} for name, value in values.items()]


def _gang(job: FineTuneJob, slot: PodSlot, settings: Settings) -> dict[str, str]:
    topology = job.spec.topology
    num_nodes = max(slot.num_nodes, slot.node_rank + 1)
    return {
        environment.NODE_RANK: str(slot.node_rank),
        environment.NUM_NODES: str(num_nodes),
        environment.PROCESSES_PER_NODE: str(topology.processes_per_node),
        environment.MASTER_PORT: str(settings.rendezvous_port),
        environment.BACKEND: backend(topology),
        **({environment.MTBF_SECONDS: f"{slot.mtbf_seconds:g}"} if slot.mtbf_seconds else {}),
        **({environment.STANDBY: "1"} if slot.is_standby else {}),
        **({environment.CHECK_DEVICES: "1"} if slot.checks_devices else {}),
    }


def _folders(job: FineTuneJob, settings: Settings) -> dict[str, str]:
    meta = job.metadata
    folder = paths.job_folder(meta.namespace, meta.name, meta.uid)
    return {
        environment.CHECKPOINT_DIR: f"{layout.STORAGE}/{folder}",
        environment.CACHE_DIR: cache_dir(settings),
        **({environment.OUTPUT_SECRETS: layout.OUTPUT_SECRETS} if output_secrets(job.spec) else {}),
        **({environment.SCRATCH_DIR: f"{layout.NODE_DISK}/{folder}"} if job.spec.checkpoint.scratch else {}),
        **_bucket(job.spec.checkpoint.storage, folder),
    }


def _script(job: FineTuneJob) -> dict[str, str]:
    script = job.spec.training.script
    config = script.config_map if script is not None else None
    return {environment.SCRIPT: f"{layout.SCRIPT}/{config.key}"} if config is not None else {}


def _bucket(storage: StorageSpec | None, folder: str) -> dict[str, str]:
    if storage is None or storage.bucket is None:
        return {}
    endpoint = storage.bucket.endpoint
    return {
        environment.BUCKET: f"{storage.bucket.url.rstrip('/')}/{folder}",
        **({environment.S3_ENDPOINT: endpoint} if endpoint else {}),
    }


def _coordinator(settings: Settings) -> dict[str, str]:
    url = settings.coordinator_url
    ca = settings.coordinator_ca_config or settings.coordinator_ca_in_run
    return {
        environment.COORDINATOR_URL: url,
        environment.COORDINATOR_TOKEN: f"{layout.TOKEN}/{layout.TOKEN_FILE}" if url else "",
        environment.COORDINATOR_CA: f"{layout.TOKEN}/{layout.CA_FILE}" if url and ca else "",
        environment.BEAT_SECONDS: f"{settings.beat_seconds:g}",
        environment.HOLD_SECONDS: f"{settings.hold_seconds:g}",
    }
