"""Storage of checkpoints: the volumes, the bucket and the scratch disk of `spec.checkpoint`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_contract.spec_model import Location, SpecModel
from finetune_operator.api.fields import ObjectName, Path


class PersistentVolumeClaim(SpecModel):
    """A claim in the job's namespace; ReadWriteMany if the job has several pods."""

    claim_name: ObjectName = Field(description="Name of the PersistentVolumeClaim")


class HostPath(SpecModel):
    """A folder of the node. It is shared by all nodes only if an administrator mounts shared storage there."""

    path: Path = Field(description="Absolute path on the node")


class Nfs(SpecModel):
    """An NFS export."""

    server: ObjectName = Field(description="Host name or address of the server")
    path: Path = Field(description="Exported path")


class BucketSpec(SpecModel):
    """A folder of an object store. Credentials come from spec.secrets or from the pods' workload identity."""

    url: Location = Field(
        description="URL of the folder: s3://, gs:// or az:// with the bucket and a path, e.g. s3://models/checkpoints"
    )
    endpoint: Location | None = Field(
        default=None, description="Address of another S3 server than the public one, e.g. https://minio.example.com"
    )


class StorageSpec(SpecModel):
    """Storage of the checkpoints: exactly one of three kinds of volume, or a bucket."""

    persistent_volume_claim: PersistentVolumeClaim | None = Field(default=None, description="A PersistentVolumeClaim")
    host_path: HostPath | None = Field(default=None, description="A folder of the node")
    nfs: Nfs | None = Field(default=None, description="An NFS export")
    bucket: BucketSpec | None = Field(
        default=None,
        description="A folder of an object store; the pods then share no volume, and each fills its own cache",
    )


class ScratchSpec(SpecModel):
    """The nodes' own disks (emptyDir), which checkpoints are written to first."""

    size_limit: Annotated[str, Field(max_length=32)] | None = Field(
        default=None, description="Maximum size, e.g. 50Gi; it must hold three checkpoints"
    )
