"""Compares what a run will write with the free space of its volumes, before anything is computed. Called by `run`.

The sizes are estimates from the headers of the base's files. Object stores have no known limit and are not checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_contract import paths
from finetune_contract.run_spec import RunSpec
from finetune_trainer.delivery.folder_target import FolderTarget
from finetune_trainer.delivery.open import DeliveryPlace, open_target
from finetune_trainer.errors import ConfigError, StorageOutageError
from finetune_trainer.models.family import Family
from finetune_trainer.train.hardware import count_weights
from finetune_trainer.train.preset import Weights
from finetune_trainer.train.space.sizes import checkpoint_bytes, num_checkpoints, output_bytes

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Need:
    """What a run writes to one folder.

    Attributes:
        field: field of the spec.
        folder: the folder; it may not exist yet.
        num_bytes: estimated size.
        detail: what it consists of.
        remedy: how to need less.
    """

    field: str
    folder: Path
    num_bytes: int
    detail: str
    remedy: str


FreeSpace = Callable[[Path], tuple[object, int | None]]
"""Returns the file system of a folder, and its free bytes; None if it does not tell."""


def check_space(spec: RunSpec, family: Family, place: DeliveryPlace, attempt: int) -> None:
    """Refuse a run whose checkpoints and outputs do not fit into its volumes. Only rank 0 calls it.

    Raises:
        ConfigError: they never fitted. The message names the fields, what is needed and free, and the remedy.
        StorageOutageError: an earlier attempt had the space, or was to get it; another attempt follows.
    """
    weights = count_weights(spec.training, family, spec.dataset.shuffle_tags is not None)
    needs = find_needs(spec, weights, _size_of_base(family), place)
    if shortage := find_shortage(needs, measure_free):
        raise ConfigError(shortage) if attempt == 1 else StorageOutageError(shortage)


def find_needs(spec: RunSpec, weights: Weights, base_bytes: int, place: DeliveryPlace) -> list[Need]:
    """Return what a run writes to folders.

    Args:
        spec: the run.
        weights: the weights of its method.
        base_bytes: size of the base's files.
        place: where its outputs go.
    """
    needs = []
    if place.bucket is None:
        size, number = checkpoint_bytes(spec.training, weights), num_checkpoints(spec)
        needs.append(
            Need(
                "checkpoint.storage",
                paths.checkpoints(place.job_dir),
                size * number,
                f"{number} checkpoints of {_format(size)}",
                "write a smaller checkpoint.keep",
            )
        )
    for number, output in enumerate(spec.outputs):
        target = open_target(number, output, place)
        if isinstance(target, FolderTarget):
            needs.append(
                Need(
                    f"outputs[{number}].to",
                    Path(target.location),
                    output_bytes(output, spec.training, weights, base_bytes),
                    f"format {output.format.value}",
                    "write the output to another volume or to an object store",
                )
            )
    return needs


def find_shortage(needs: Sequence[Need], free: FreeSpace) -> str | None:
    """Return why the needs do not fit, for the first file system that is too small; None if they do."""
    groups: dict[object, list[Need]] = {}
    spaces: dict[object, int | None] = {}
    for need in needs:
        system, num_free = free(need.folder)
        groups.setdefault(system, []).append(need)
        spaces[system] = num_free
    for system, group in groups.items():
        total, num_free = sum(need.num_bytes for need in group), spaces[system]
        if num_free is not None and total > num_free:
            return _describe(group, total, num_free)
    return None


def _describe(group: Sequence[Need], total: int, num_free: int) -> str:
    largest = max(group, key=lambda need: need.num_bytes)
    details = ", ".join(f"{need.detail} ({need.field})" for need in group)
    return (
        f"{largest.field}: the run will write about {_format(total)} to the file system of {largest.folder} "
        f"({details}), and {_format(num_free)} are free; enlarge the volume, or {largest.remedy}"
    )


def measure_free(folder: Path) -> tuple[object, int | None]:
    """Return the device of a folder's file system, and its free bytes; None for one that does not tell its size."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        found = os.statvfs(folder)
        return folder.stat().st_dev, found.f_bavail * found.f_frsize if found.f_blocks else None
    except OSError:
        # A folder that cannot be read is reported when it is written.
        return str(folder), None


def _size_of_base(family: Family) -> int:
    files = [*family.denoiser_files(), *family.text_encoder_files(), *family.image_encoder_files()]
    return sum(_sizes(dict.fromkeys(files)))


def _sizes(files: Iterable[Path]) -> Iterable[int]:
    for file in files:
        if file.is_file():
            yield file.stat().st_size


def _format(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"
