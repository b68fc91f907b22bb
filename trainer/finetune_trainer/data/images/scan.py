"""What the images of a source are: their hashes and sizes, and which of them are broken.

Every image is decoded once, by whichever rank; the answer goes into the cache by the file's content, so that the next
attempt, and the next job with the same images, only reads the answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from finetune_trainer.data.cache.encode import Progress, fill
from finetune_trainer.data.cache.hashes import FileHashes, hash_text
from finetune_trainer.data.cache.store import Item, TensorCache
from finetune_trainer.data.images import decoding
from finetune_trainer.data.sources.base import Samples, Source, whole_image
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DataError

_SIZE = "size"
_NUM_NAMED = 10
"""Broken images that are named; the others are counted."""

Opener = Callable[[int], IO[bytes]]


@dataclass(frozen=True)
class ImageScan:
    """What was found.

    Attributes:
        ids: SHA-256 of each image's bytes; empty where it cannot be read.
        sizes: width and height of each as it is seen, int32 (n, 2); zeros where it is broken.
    """

    ids: tuple[str, ...]
    sizes: np.ndarray[tuple[int, int], np.dtype[np.int32]]

    @property
    def broken(self) -> list[int]:
        """Those that are no whole images."""
        return [int(index) for index in np.flatnonzero(self.sizes[:, 0] == 0)]

    @property
    def all_square(self) -> bool:
        """Whether there is nothing to crop."""
        return bool((self.sizes[:, 0] == self.sizes[:, 1]).all())

    def without(self, gone: Sequence[int]) -> ImageScan:
        """The census of the others."""
        left = set(gone)
        ids = tuple(each for index, each in enumerate(self.ids) if index not in left)
        return ImageScan(ids, np.delete(self.sizes, list(gone), axis=0))


class KeptSamples:
    """A data set without some of its samples; see `Samples`."""

    def __init__(self, samples: Samples, gone: Sequence[int]) -> None:
        self._samples = samples
        self._kept = np.delete(np.arange(len(samples)), list(gone))

    def __len__(self) -> int:
        return len(self._kept)

    def caption(self, index: int) -> str:
        """Caption of a sample."""
        return self._samples.caption(int(self._kept[index]))

    def open_conditioning(self, index: int) -> IO[bytes]:
        """The encoded conditioning image of a sample."""
        return self._samples.open_conditioning(int(self._kept[index]))

    def name(self, index: int) -> str:
        """How a person finds the sample."""
        return self._samples.name(int(self._kept[index]))


class KeptSource(KeptSamples):
    """A source without some of its samples; see `Source`."""

    def __init__(self, source: Source, gone: Sequence[int]) -> None:
        super().__init__(source, gone)
        self._source = source

    def open(self, index: int) -> IO[bytes]:
        """The encoded image of a sample."""
        return self._source.open(int(self._kept[index]))

    def file(self, index: int) -> Path | None:
        """The file that holds the image and nothing else."""
        return self._source.file(int(self._kept[index]))


def scan_images(  # noqa: PLR0913, PLR0917  all of it differs from call to call
    count: int, opener: Opener, root: Path, hashes: FileHashes, world: World, progress: Progress
) -> ImageScan:
    """Look at all images; all ranks take part, and come to the same answer.

    Args:
        count: number of images.
        opener: opens one of them.
        root: the cache that all jobs share.
        hashes: hashes of files, each made once.
        world: the ranks.
        progress: told how far this rank is.
    """
    ids = _all_ids(count, opener, hashes, world)
    cache = TensorCache(root / "images")
    work = {_key(each): index for index, each in enumerate(ids) if each}

    def measure(index: int) -> Item:
        try:
            with opener(index) as file, whole_image(str(index)):
                return {_SIZE: torch.tensor(decoding.decode(file).size, dtype=torch.int32)}
        except DataError:
            return {_SIZE: torch.zeros(2, dtype=torch.int32)}

    fill(cache, work, lambda: measure, world, progress)
    sizes = np.zeros((count, 2), dtype=np.int32)
    known = [(index, _key(each)) for index, each in enumerate(ids) if each]
    # In any other order most of them would open a shard anew.
    for index, key in sorted(known, key=lambda pair: cache.shard(pair[1])):
        sizes[index] = cache.get(key)[_SIZE].numpy()
    return ImageScan(ids, sizes)


def describe_broken(source: Samples, broken: Sequence[int]) -> str:
    """How many images are broken, and the first of them by name."""
    named = ", ".join(source.name(index) for index in broken[:_NUM_NAMED])
    more = f" and {len(broken) - _NUM_NAMED} more" if len(broken) > _NUM_NAMED else ""
    verb = "is" if len(broken) == 1 else "are"
    return f"dataset.source: {len(broken)} of {len(source)} images {verb} broken: {named}{more}"


def _all_ids(count: int, opener: Opener, hashes: FileHashes, world: World) -> tuple[str, ...]:
    """Hashes of all images, of which each rank has made its share."""
    share = [_id_of(opener, index, hashes) for index in range(world.rank, count, world.size)]
    ids = [""] * count
    for rank in range(world.size):
        ids[rank :: world.size] = world.share(share, rank)
    return tuple(ids)


def _id_of(opener: Opener, index: int, hashes: FileHashes) -> str:
    try:
        with opener(index) as file:
            name = getattr(file, "name", None)
            if isinstance(name, str) and Path(name).is_file():
                return hashes.of_file(Path(name))
            return hashlib.sha256(file.read()).hexdigest()
    except (OSError, DataError):
        return ""


def _key(image_id: str) -> str:
    return hash_text("size", image_id)
