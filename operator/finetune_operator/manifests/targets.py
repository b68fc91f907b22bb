"""Finds outputs that a pod cannot write, or that are lost with it. Pure; the plan and `finetune validate` call it.

Only the operator can see this before pods hold GPUs: the trainer knows neither its mounts nor what survives it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_contract import paths
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import CONTAINER
from finetune_operator.manifests import layout

LOST = frozenset({"emptyDir", "ephemeral"})
"""Kinds of volumes that are deleted with their pod."""
NEVER_WRITABLE = frozenset({"configMap", "secret", "projected", "downwardAPI", "image"})
"""Kinds of volumes that no container can write to."""


def find_misplaced_outputs(job: FineTuneJob, pod: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each output whose folder a pod of the job cannot write, or that is lost with the pod.

    Args:
        job: the job.
        pod: the manifest of one of its pods.
    """
    for number, output in enumerate(job.spec.outputs):
        if "://" in output.to:
            continue
        folder = paths.job_folder(job.metadata.namespace, job.metadata.name, job.metadata.uid)
        own = f"{layout.STORAGE}/{folder}/{paths.OUTPUTS}"
        path = posixpath.normpath(posixpath.join(own, output.to))
        if _is_below(path, own):
            # The trainer copies this folder to the bucket if the storage is one.
            continue
        if problem := _find_problem(path, pod):
            yield (
                f"spec.outputs[{number}].to: {output.to} {problem}; write a relative path, e.g. to: lora, for the "
                "job's own folder on its storage"
            )


def _find_problem(path: str, pod: Mapping[str, Any]) -> str | None:
    """Return why a path in the trainer's container cannot hold an output; None if it can."""
    container = next(one for one in pod["spec"]["containers"] if one.get("name") == CONTAINER)
    mounts = [mount for mount in container.get("volumeMounts") or () if _is_below(path, str(mount.get("mountPath")))]
    mount = max(mounts, key=lambda one: len(str(one["mountPath"]).rstrip("/")), default=None)
    if mount is None:
        is_read_only = (container.get("securityContext") or {}).get("readOnlyRootFilesystem", False)
        effect = "cannot be written" if is_read_only else "is lost with the pod"
        return f"is on no volume of the pods, so it {effect}"
    volumes = {volume.get("name"): volume for volume in pod["spec"].get("volumes") or ()}
    kinds = set(volumes.get(mount.get("name"), {})) - {"name"}
    if mount.get("readOnly") or kinds & NEVER_WRITABLE:
        return f"is on a volume that is mounted read-only at {mount['mountPath']}"
    if kinds & LOST:
        (kind,) = kinds & LOST
        return f"is on a volume that is deleted with its pod ({mount['mountPath']} is {kind})"
    return None


def _is_below(path: str, folder: str) -> bool:
    """Return whether an absolute path is a folder, or is in it."""
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")
