"""The image scan: the hashes and sizes of a source's images, and which of them are broken.

One of the ranks decodes each image once. The result is cached by the file's content, so the next job with the same
images only reads the results. The results of a list of files are in one index, which a later attempt reads instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from finetune_trainer import patience
from finetune_trainer.data.cache.encode import Progress, fill
from finetune_trainer.data.cache.scan_index import (
    NO_FILE,
    FileChecks,
    FileStates,
    ScanIndex,
    find_changed,
    index_path,
    read_index,
    write_index,
)
from finetune_trainer.data.cache.store import Item, TensorCache
from finetune_trainer.data.hashes import FileHashes, FileState, hash_text
from finetune_trainer.data.images import decoding
from finetune_trainer.data.images.decoding import image_errors
from finetune_trainer.data.sources.base import SampleSet
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DataError

_SIZE = "size"
_NUM_NAMED = 10
"""Broken images that are named; the others are counted."""

ImageOpener = Callable[[int], IO[bytes]]
"""Opens the encoded image with this index."""


@dataclass(frozen=True)
class ImageScan:
    """The result of a scan.

    Attributes:
        ids: SHA-256 of each image's bytes; empty if they cannot be read.
        sizes: width and height of each decoded image, int32 (n, 2); zeros if it is broken.
    """

    ids: tuple[str, ...]
    sizes: np.ndarray[tuple[int, int], np.dtype[np.int32]]

    @property
    def broken(self) -> list[int]:
        """Indices of the images that cannot be decoded."""
        return [int(index) for index in np.flatnonzero(self.sizes[:, 0] == 0)]

    @property
    def all_square(self) -> bool:
        """Return whether all images are square, so that no cropping is needed."""
        return bool((self.sizes[:, 0] == self.sizes[:, 1]).all())

    @classmethod
    def join(cls, scans: Sequence[ImageScan]) -> ImageScan:
        """Return the scan of several lists of images, one after the other."""
        return cls(tuple(each for scan in scans for each in scan.ids), np.concatenate([scan.sizes for scan in scans]))

    def take(self, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> ImageScan:
        """Return the scan of the images with these indices, in their order."""
        return ImageScan(tuple(self.ids[index] for index in indices.tolist()), self.sizes[indices])

    def without(self, removed: Sequence[int]) -> ImageScan:
        """Return the scan of the other images."""
        excluded = set(removed)
        ids = tuple(each for index, each in enumerate(self.ids) if index not in excluded)
        return ImageScan(ids, np.delete(self.sizes, list(removed), axis=0))


def scan_images(  # noqa: PLR0913, PLR0917  every argument differs between the calls
    count: int,
    opener: ImageOpener,
    root: Path,
    hashes: FileHashes,
    world: World,
    progress: Progress,
    files: Sequence[Path] | None = None,
    checks: FileChecks | None = None,
) -> ImageScan:
    """Scan all images. All ranks take part and get the same result.

    Args:
        count: number of images.
        opener: opens one of them.
        root: the cache that all jobs share.
        hashes: hashes of files, each computed once.
        world: the ranks.
        progress: receives this rank's progress.
        files: the files of the images; None if the images are not separate files.
        checks: compares the files with an index in the background; None: they are compared now.
    """
    if files is None:
        return _scan(count, opener, root, hashes, world, progress)[0]
    path = index_path(root, files, f"decoder {decoding.VERSION}")
    if (index := _trusted_index(path, files, world, checks)) is not None:
        return ImageScan(index.ids, index.sizes)
    scan, states = _scan(count, opener, root, hashes, world, progress)
    if world.local_rank == 0:
        write_index(path, ScanIndex(scan.ids, scan.sizes, states))
    return scan


def _trusted_index(path: Path, files: Sequence[Path], world: World, checks: FileChecks | None) -> ScanIndex | None:
    """Return the index of these files, the same on all ranks; None if a rank lacks it or a file has another state."""
    index = read_index(path, len(files))
    if not all(world.gather_numbers(int(index is not None))):
        return None
    assert index is not None
    share = slice(world.rank, None, world.size)
    if checks is not None:
        checks.start(files, index, share, path)
        return index
    changed = find_changed(files[share], index.states[share])
    return None if any(world.gather_numbers(len(changed))) else index


def _scan(  # noqa: PLR0913, PLR0917  those of scan_images
    count: int, opener: ImageOpener, root: Path, hashes: FileHashes, world: World, progress: Progress
) -> tuple[ImageScan, FileStates]:
    """Scan all images without an index.

    Returns:
        The scan, and the states of the files before they were read.
    """
    ids, states = _hash_all(count, opener, hashes, world)
    cache = TensorCache(root / "images")
    work = {_key(each): index for index, each in enumerate(ids) if each}

    def measure(index: int) -> Item:
        def decode() -> Item:
            with opener(index) as file, image_errors(str(index)):
                return {_SIZE: torch.tensor(decoding.decode(file).size, dtype=torch.int32)}

        try:
            return patience.wait_out(f"dataset.source: reading image {index}", decode)
        except DataError:
            return {_SIZE: torch.zeros(2, dtype=torch.int32)}

    fill(cache, work, lambda: measure, world, progress)
    sizes = np.zeros((count, 2), dtype=np.int32)
    _read_sizes(cache, [(index, _key(each)) for index, each in enumerate(ids) if each], sizes)
    # An older decoder may have judged them.
    broken = world.share([index for index in np.flatnonzero(sizes[:, 0] == 0).tolist() if ids[index]])
    again = [(index, _checked_key(ids[index])) for index in broken]
    fill(cache, {key: index for index, key in again}, lambda: measure, world, progress)
    _read_sizes(cache, again, sizes)
    return ImageScan(ids, sizes), states


def _read_sizes(
    cache: TensorCache, keys: Sequence[tuple[int, str]], sizes: np.ndarray[tuple[int, int], np.dtype[np.int32]]
) -> None:
    """Read the sizes of images, given by index and key, from the cache into their rows."""
    # Shard by shard: in any other order most reads would open a shard again.
    for index, key in sorted(keys, key=lambda pair: cache.shard(pair[1])):
        sizes[index] = cache.get(key)[_SIZE].numpy()


def describe_broken(source: SampleSet, broken: Sequence[int]) -> str:
    """Return a message with the number of broken images and the names of the first ones."""
    named = ", ".join(source.name(index) for index in broken[:_NUM_NAMED])
    more = f" and {len(broken) - _NUM_NAMED} more" if len(broken) > _NUM_NAMED else ""
    verb = "is" if len(broken) == 1 else "are"
    return f"dataset.source: {len(broken)} of {len(source)} images {verb} broken: {named}{more}"


def _hash_all(count: int, opener: ImageOpener, hashes: FileHashes, world: World) -> tuple[tuple[str, ...], FileStates]:
    """Return the hashes of all images, and the states of their files; each rank computes its part of them."""
    share = [_hash_image(opener, index, hashes) for index in range(world.rank, count, world.size)]
    found: list[tuple[str, FileState]] = [("", NO_FILE)] * count
    for rank in range(world.size):
        found[rank :: world.size] = world.share(share, rank)
    states = np.array([state for _, state in found], dtype=np.int64).reshape(count, 3)
    return tuple(each for each, _ in found), states


def _hash_image(opener: ImageOpener, index: int, hashes: FileHashes) -> tuple[str, FileState]:
    """Return the hash of an image, and the state of its file."""

    def hash_once() -> tuple[str, FileState]:
        with opener(index) as file:
            name = getattr(file, "name", None)
            if isinstance(name, str) and Path(name).is_file():
                return hashes.of_file_with_state(Path(name))
            return hashlib.sha256(file.read()).hexdigest(), NO_FILE

    try:
        return patience.wait_out(f"dataset.source: reading image {index}", hash_once)
    except (OSError, DataError):
        return "", NO_FILE


def _key(image_id: str) -> str:
    return hash_text("size", image_id)


def _checked_key(image_id: str) -> str:
    return hash_text("size", image_id, f"decoder {decoding.VERSION}")
