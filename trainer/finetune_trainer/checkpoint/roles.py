"""Decides which rank writes to which disk, and which checkpoint the ranks resume from.

The ranks detect whether they share a disk with rank 0. Those that do write each checkpoint together. Every other node
keeps complete checkpoints on its own disk, and all ranks can resume from any one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from finetune_contract import paths
from finetune_contract.manifest import read_manifest
from finetune_trainer.checkpoint.sharded_state import ShardedState
from finetune_trainer.checkpoint.shards import ShardReader
from finetune_trainer.checkpoint.snapshot import Committed, Snapshot
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.checkpoint.store.base import CheckpointStore
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import StorageError
from finetune_trainer.patience import wait_out

OPENING, READING = "checkpoint storage: opening", "checkpoint storage: reading"
_READING_EARLIER = "checkpoint.from: reading"
"""What a rank waits for during an outage of the storage."""


@dataclass(frozen=True)
class Role:
    """A rank's part in saving and restoring.

    Attributes:
        rank: the rank.
        sharing: ranks that share rank 0's disk, rank 0 first.
        own_disk: whether this rank writes complete checkpoints to its node's own disk.
    """

    rank: int
    sharing: tuple[int, ...]
    own_disk: bool

    @property
    def chooses(self) -> bool:
        """Return whether this rank searches a disk for a checkpoint."""
        return self.rank == 0 or self.own_disk

    @property
    def writes(self) -> bool:
        """Return whether this rank writes in an ordinary save."""
        return self.rank in self.sharing or self.own_disk


class EarlierCheckpoint(Protocol):
    """A checkpoint of another job to start from."""

    def find(self) -> Committed:
        """Return it, verified, in a folder of this machine.

        Raises:
            ConfigError: there is none.
            StorageError: it cannot be read now.
        """
        ...

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Return whether its optimizer state fits, by its values that are not tensors.

        Raises:
            ConfigError: this run cannot continue from it.
        """
        ...

    def release(self) -> None:
        """Remove local copies, when the run has saved its state."""
        ...


def open_storage(store: CheckpointStore, world: World) -> Role:
    """Mark the attempt on every disk, and detect which ranks share rank 0's disk. All ranks call it.

    Raises:
        StorageError: a disk cannot be written.
        SupersededError: a newer attempt has begun.
        FabricError: a peer was lost.
    """
    if world.is_first:
        wait_out(OPENING, store.open)
    probe = world.share(wait_out(OPENING, store.put_probe) if world.is_first and world.size > 1 else "")
    shares = world.is_first or store.has_probe(probe)
    flags = world.gather_numbers(int(shares))
    if world.is_first and world.size > 1:
        store.remove_probe(probe)
    own_disk = not shares and world.local_rank == 0
    if own_disk:
        wait_out(OPENING, store.open)
    return Role(world.rank, tuple(rank for rank, flag in enumerate(flags) if flag), own_disk)


def choose_checkpoint(
    store: CheckpointStore, role: Role, world: World, warn: Callable[[str], None]
) -> tuple[Committed | None, Snapshot | None]:
    """Choose the newest valid checkpoint of all disks, and send its contents to every rank. All ranks call it.

    Returns:
        The checkpoint, on the rank that read it, else None; and its contents, on every rank. Both are None if no valid
        checkpoint exists.

    Raises:
        StorageError: a disk cannot be read.
        FabricError: a peer was lost.
    """
    found = wait_out(READING, lambda: store.choose(warn)) if role.chooses else None
    steps = world.gather_numbers(-1 if found is None else found.manifest.step)
    source = steps.index(max(steps))
    if steps[source] < 0:
        return None, None
    if source != world.rank:
        found = None
    snapshot = None if found is None else _read(store, found, READING)
    return found, _share(snapshot, world, source)


def choose_shards(store: CheckpointStore, role: Role, world: World, warn: Callable[[str], None]) -> Committed | None:
    """Choose the newest valid checkpoint for sharded training. All ranks call it; each then reads what it needs.

    Raises:
        StorageError: a rank cannot access rank 0's storage, or the storage cannot be read.
        FabricError: a peer was lost.
    """
    if len(role.sharing) < world.size:
        separate = sorted(set(range(world.size)) - set(role.sharing))
        raise StorageError(
            f"spec.checkpoint.storage: ranks {separate} cannot access rank 0's checkpoints, and with sharding each "
            "rank writes a part of every checkpoint; use a volume that all pods share, or a bucket"
        )
    found = wait_out(READING, lambda: store.choose(warn)) if world.is_first else None
    name = world.share(found.folder.name if found else "")
    if not name:
        return None
    return found or wait_out(READING, lambda: store.find(name))


def start_from(earlier: EarlierCheckpoint, state: TrainState, store: CheckpointStore, world: World) -> None:
    """Start from another job's checkpoint. All ranks call it.

    Args:
        earlier: finds the checkpoint.
        state: receives its weights, its optimizer state and its step.
        store: reads checkpoints.
        world: the ranks.

    Raises:
        ConfigError: there is no such checkpoint, or it does not fit.
        StorageError: it cannot be read.
        FabricError: a peer was lost.
    """
    found = wait_out(_READING_EARLIER, earlier.find) if world.is_first else None
    if not isinstance(state, ShardedState):
        snapshot = _share(None if found is None else _read(store, found, _READING_EARLIER), world, 0)
        state.start_from(snapshot, earlier.fits(snapshot.values))
        return
    folder = world.share(None if found is None else found.folder)
    if found is None:
        assert folder is not None
        is_visible = (folder / paths.MANIFEST).is_file()
        found = Committed(folder, read_manifest(folder)) if is_visible else wait_out(_READING_EARLIER, earlier.find)
    shards, values = read_shards(found, store, _READING_EARLIER)
    earlier.fits(values)
    state.start_from_shards(shards, values)


def read_shards(found: Committed, store: CheckpointStore, what: str) -> tuple[ShardReader, dict[str, Any]]:
    """Open the shards of a checkpoint, and read its values that are not tensors.

    Raises:
        StorageError: it cannot be read.
    """
    files = [found.folder / entry.name for entry in found.manifest.files]
    return wait_out(what, lambda: (ShardReader(files), store.load_values(found)))


def _read(store: CheckpointStore, found: Committed, what: str) -> Snapshot:
    return wait_out(what, lambda: store.load(found))


def _share(snapshot: Snapshot | None, world: World, source: int) -> Snapshot:
    """Send what one rank has read to every rank, so that no disk must be shared."""
    header = None
    if snapshot is not None:
        header = (snapshot.step, dict(snapshot.values), sorted(snapshot.tensors))
    header = world.share(header, source)
    assert header is not None
    step, values, groups = header
    tensors = {
        group: world.share_tensors(None if snapshot is None else snapshot.tensors[group], source) for group in groups
    }
    return Snapshot(step, tensors, values)
