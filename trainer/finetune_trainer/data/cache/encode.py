"""The map phase: all ranks compute the outputs of the frozen encoders once, and store them in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from finetune_trainer.data.cache.store import Item, TensorCache
from finetune_trainer.data.hashes import FileHashes, hash_text
from finetune_trainer.data.images.decoding import CropView, decode_sample, to_pixels
from finetune_trainer.data.sampling.shapes import Shapes
from finetune_trainer.data.sources.base import SampleSource
from finetune_trainer.distributed.world import World
from finetune_trainer.models.family import Family, ImageEncoder
from finetune_trainer.models.text import TextEncoder

SHARD_ITEMS = 256
SHARD_SECONDS = 5.0
"""Longest time between two writes. A preemption loses what has not been written."""

Progress = Callable[[int, int], None]
"""Receives the number of items that this rank has finished, and the number that it has to do."""


@dataclass(frozen=True)
class Posterior:
    """The VAE's posterior distribution of an image's latents.

    Attributes:
        mean: mean of the unscaled latents, float32 (C, h, w), on any device.
        std: their standard deviation, the same shape.
        size: width and height of the image as stored.
    """

    mean: Tensor
    std: Tensor
    size: tuple[int, int]

    def sample(self, noise: Tensor) -> Tensor:
        """Return latents (C, h, w) that are sampled with the given standard normal noise."""
        return self.mean + self.std * noise


def fill(
    cache: TensorCache,
    work: dict[str, int],
    make_encoder: Callable[[], Callable[[int], Item]],
    world: World,
    progress: Progress,
) -> None:
    """Compute the items that the cache lacks, an equal part on each rank, and wait until all are stored.

    Items are encoded one by one. In a batch, the last bits of an item would depend on its neighbours, and these on the
    point where a killed map phase had stopped.

    Args:
        cache: stores the items.
        work: key of each item, and the number by which the encoder identifies it.
        make_encoder: loads the encoder; called only if an item is missing.
        world: the ranks.
        progress: called after each item.
    """
    if world.is_first:
        cache.sweep(time.time())
    cache.refresh()
    # All ranks use one list: what is missing at the time of a rank's check depends on what the others have written.
    missing = world.share(cache.missing(work))
    _encode([(key, work[key]) for key in missing[world.rank :: world.size]], cache, make_encoder, progress)
    world.barrier()
    cache.refresh()
    # If the ranks share no disk, each rank also computes the items that the other ranks have stored on their disks.
    _encode([(key, work[key]) for key in cache.missing(work)], cache, make_encoder, progress)
    cache.refresh()
    if world.local_rank == 0:
        cache.save_index()


def _encode(
    work: Sequence[tuple[str, int]],
    cache: TensorCache,
    make_encoder: Callable[[], Callable[[int], Item]],
    progress: Progress,
) -> None:
    if not work:
        return
    encode = make_encoder()
    done: dict[str, Item] = {}
    written_at = time.monotonic()
    for count, (key, number) in enumerate(work, start=1):
        done[key] = encode(number)
        progress(count, len(work))
        if len(done) == SHARD_ITEMS or time.monotonic() - written_at > SHARD_SECONDS or count == len(work):
            cache.put(done)
            done, written_at = {}, time.monotonic()


class TextCache:
    """The text embeddings of captions."""

    def __init__(self, root: Path, family: Family, hashes: FileHashes, dtype: torch.dtype) -> None:
        self._family = family
        self._dtype = dtype
        self._encoder_id = hash_text(
            "text", hashes.of_files(family.text_encoder_files()), str(dtype), *family.text_settings.key
        )
        self._cache = TensorCache(root / "text" / self._encoder_id[:32])

    def fill(self, captions: Sequence[str], world: World, progress: Progress) -> None:
        """Compute the embeddings of these captions that the cache lacks."""
        distinct = sorted(set(captions))

        def make_encoder() -> Callable[[int], Item]:
            encode = self._make_encoder(world.device)
            return lambda number: encode(distinct[number])

        fill(self._cache, {self._key(text): i for i, text in enumerate(distinct)}, make_encoder, world, progress)

    def get(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings of captions, stacked (n, ...). `fill` must have computed them."""
        items = [self._cache.get(self._key(caption)) for caption in captions]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def live(self, device: torch.device) -> LiveTexts:
        """Return the same embeddings, computed on request."""
        return LiveTexts(self._make_encoder(device))

    def _make_encoder(self, device: torch.device) -> Callable[[str], Item]:
        encoder: TextEncoder = self._family.load_text_encoder(device)

        @torch.no_grad()
        def encode(caption: str) -> Item:
            return {name: value[0].to(self._dtype) for name, value in encoder.encode([caption]).items()}

        return encode

    def _key(self, caption: str) -> str:
        return hash_text(self._encoder_id, caption)


class LiveTexts:
    """Embeddings that are computed on request, because captions have too many forms to store them all.

    They are computed one by one: in a batch, the last bits of an embedding would depend on its neighbours.
    """

    def __init__(self, encode: Callable[[str], Item]) -> None:
        self._encode = encode

    def get(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings of captions, stacked (n, ...)."""
        items = [self._encode(caption) for caption in captions]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class LatentStore:
    """The posteriors of images by content and view, for one VAE and one set of shapes."""

    def __init__(self, root: Path, family: Family, hashes: FileHashes, shapes: Shapes) -> None:
        self._family = family
        self._shapes = shapes
        self._encoder_id = hash_text("latents with sizes", hashes.of_files(family.image_encoder_files()), str(shapes))
        self.cache = TensorCache(root / "latents" / self._encoder_id[:32])

    def key(self, image_id: str, view: CropView) -> str:
        """Return the key of the posterior of an image in a view."""
        return hash_text(self._encoder_id, image_id, f"{view.left} {view.top} {view.flip}")

    def make_encoder(self, device: torch.device) -> Callable[[Image.Image, CropView], Item]:
        """Load the VAE, and return a function that computes the item of an image in a view."""
        encoder = self._family.load_image_encoder(device)

        def encode(image: Image.Image, view: CropView) -> Item:
            posterior = encode_image(encoder, image, self._shapes, view)
            return {"mean": posterior.mean, "std": posterior.std, "size": torch.tensor(posterior.size)}

        return encode

    def posterior(self, image_id: str, view: CropView) -> Posterior:
        """Return the posterior of an image in a view. The cache must hold it."""
        item = self.cache.get(self.key(image_id, view))
        width, height = item["size"].tolist()
        return Posterior(item["mean"], item["std"], (width, height))


class LatentCache:
    """The posteriors of the images of one data set, for a few fixed views of each image."""

    def __init__(self, store: LatentStore, image_ids: Sequence[str]) -> None:
        self._store = store
        self._image_ids = image_ids

    def fill(self, source: SampleSource, views: Sequence[CropView], world: World, progress: Progress) -> None:
        """Compute the posteriors of all images in each of the views that the cache lacks."""
        numbers = [(index, view) for index in range(len(source)) for view in views]
        work = {self._store.key(self._image_ids[index], view): number for number, (index, view) in enumerate(numbers)}

        def make_encoder() -> Callable[[int], Item]:
            encode = self._store.make_encoder(world.device)

            def encode_number(number: int) -> Item:
                index, view = numbers[number]
                return encode(decode_sample(source, index), view)

            return encode_number

        fill(self._store.cache, work, make_encoder, world, progress)

    def posterior(self, index: int, view: CropView) -> Posterior:
        """Return the posterior of an image in a view. `fill` must have computed it."""
        return self._store.posterior(self._image_ids[index], view)


class LiveLatents:
    """Posteriors that are computed on request, because a random crop makes each of them different."""

    def __init__(self, encoder: ImageEncoder, source: SampleSource, shapes: Shapes) -> None:
        self._encoder = encoder
        self._source = source
        self._shapes = shapes

    def posterior(self, index: int, view: CropView) -> Posterior:
        """Compute the posterior of an image in any view."""
        return encode_image(self._encoder, decode_sample(self._source, index), self._shapes, view)


def encode_image(encoder: ImageEncoder, image: Image.Image, shapes: Shapes, view: CropView) -> Posterior:
    """Encode one image with a VAE, cropped to its shape and view. The posterior is on the device of the VAE."""
    mean, std = encoder.encode(to_pixels(image, shapes.of(image.size), view).unsqueeze(0))
    return Posterior(mean[0].float(), std[0].float(), image.size)
