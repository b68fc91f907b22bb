"""Chooses the target of an output by the form of its location."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from finetune_contract import paths
from finetune_contract.bucket import is_bucket_url
from finetune_contract.outputs.spec import OutputSpec
from finetune_trainer.delivery.bucket_target import NUM_UPLOADS, BucketTarget, UploadLimits
from finetune_trainer.delivery.folder_target import FolderTarget
from finetune_trainer.delivery.hub_target import HubTarget
from finetune_trainer.delivery.parts.base import MIN_PART_BYTES
from finetune_trainer.delivery.target import Target
from finetune_trainer.errors import ConfigError

HUB = "hub://"


@dataclass(frozen=True)
class DeliveryPlace:
    """Where the outputs of a job go, and by whose credentials.

    Attributes:
        job_dir: the job's folder; relative locations are below its folder of outputs.
        namespace: namespace of the job.
        job: name of the job.
        bucket: URL of the job's folder in an object store; relative locations are then below it.
        secrets: folder with one folder for each Secret of an output; it contains a file for each key.
        min_part_bytes: smallest part of an upload.
        num_uploads: number of parts that are sent at a time.
    """

    job_dir: Path
    namespace: str = "default"
    job: str = "job"
    bucket: str | None = None
    secrets: Path | None = None
    min_part_bytes: int = MIN_PART_BYTES
    num_uploads: int = NUM_UPLOADS


def open_target(number: int, output: OutputSpec, place: DeliveryPlace) -> Target:
    """Return the target of an output.

    Args:
        number: index of the output in the manifest, for messages.
        output: the output.
        place: its job.

    Raises:
        ConfigError: the location or its Secret cannot be used.
    """
    field, to = f"outputs[{number}].to", output.to
    job = (place.namespace, place.job)
    credentials = _read_secret(number, output, place.secrets)
    if to.startswith(HUB):
        return HubTarget(field, to, job, credentials)
    if not is_bucket_url(to):
        if "://" in to:
            raise ConfigError(f"{field}: {to} is not a supported target; write a folder, s3://, gs://, az:// or hub://")
        if place.bucket is None or Path(to).is_absolute():
            # No other job writes to the job's own folder.
            is_own = not Path(to).is_absolute() and ".." not in Path(to).parts
            return FolderTarget(field, place.job_dir / paths.OUTPUTS / to, None if is_own else job)
        to = f"{place.bucket}/{PurePosixPath(paths.OUTPUTS) / to}"
    return BucketTarget(field, to, job, credentials, UploadLimits(place.min_part_bytes, place.num_uploads))


def _read_secret(number: int, output: OutputSpec, secrets: Path | None) -> Mapping[str, str]:
    """Return the variables of the Secret of an output; empty for none, and outside of a cluster.

    Raises:
        ConfigError: it contains nothing.
    """
    if output.secret is None or secrets is None:
        return {}
    folder = secrets / output.secret.name
    found = {
        path.name: path.read_text(encoding="utf-8").strip()
        for path in sorted(folder.glob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    # A kubelet's mount of a Secret has this link; the folder of a local run is empty.
    if not found and (folder / "..data").exists():
        raise ConfigError(
            f"outputs[{number}].secret: the Secret {output.secret.name} contains no keys; store the credentials of "
            f"{output.to} in it"
        )
    return found
