"""Everything between the manifest's data set and micro-batches: open the splits, fill the cache, build the makers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_contract.run_spec import RunSpec
from finetune_trainer.data.batches import Augmentation, BatchMaker, Latents
from finetune_trainer.data.draws import Draws
from finetune_trainer.data.encode import LatentCache, LiveLatents, TextCache
from finetune_trainer.data.hashes import FileHashes
from finetune_trainer.data.source import Source, all_square, open_source
from finetune_trainer.distributed.world import World
from finetune_trainer.models.family import Family

MAX_HELD_OUT = 64
"""Samples of the held-out split that are looked at: the first so many."""
LIVE_WARNING = (
    "training.centerCrop: images are not square and are cropped at random, so they are encoded anew in every step; "
    "centerCrop: true lets them be encoded once"
)


@dataclass(frozen=True)
class PreparedData:
    """What training and validation draw from.

    Attributes:
        batches: batches of the training split.
        held_out: batches of the held-out split, with draws of their own; None where none is named.
        text: embeddings of all captions and prompts.
    """

    batches: BatchMaker
    held_out: BatchMaker | None
    text: TextCache


@dataclass(frozen=True)
class Preparation:
    """How the data of a run is made ready; all ranks take part.

    Attributes:
        spec: the run.
        family: the base model, whose frozen encoders are used.
        world: the ranks.
        dtype: number format of the text embeddings.
        cache_dir: folder shared by all jobs.
        say: told how far it is.
        warn: told what a person should know.
    """

    spec: RunSpec
    family: Family
    world: World
    dtype: torch.dtype
    cache_dir: Path
    say: Callable[[str], None]
    warn: Callable[[str], None]

    def run(self) -> PreparedData:
        """Open the data set and compute what the cache lacks of it.

        Raises:
            DataError: the data set cannot be used as asked.
            StorageError: the cache cannot be written.
        """
        dataset, training = self.spec.dataset, self.spec.training
        source = open_source(dataset, dataset.split, dataset.max_samples)
        held_out = self._open_held_out()
        hashes = FileHashes(self.cache_dir / "hashes.json")
        text = TextCache(self.cache_dir, self.family, hashes, self.dtype)
        text.fill(self._texts(source, held_out), self.world, self._progress("captions"))
        random_crop = not training.center_crop and not all_square(source)
        augmentation = Augmentation(random_crop, training.random_flip)
        latents: Latents
        if random_crop:
            self.warn(LIVE_WARNING)
            latents = LiveLatents(self.family.load_image_encoder(self.world.device), source, training.resolution)
        else:
            latents = self._cached_latents(source, augmentation, hashes)
        draws = Draws(training.seed)
        batches = BatchMaker(source, latents, text, self.family, draws, augmentation, self.world.device)
        prepared = PreparedData(batches, self._held_out_batches(held_out, text, hashes), text)
        if self.world.is_first:
            hashes.keep()
        return prepared

    def _open_held_out(self) -> Source | None:
        validation = self.spec.training.validation
        if validation is None or validation.split is None:
            return None
        return open_source(self.spec.dataset, validation.split, MAX_HELD_OUT)

    def _texts(self, *sources: Source | None) -> Sequence[str]:
        """All texts that the model is shown: captions, prompts, and for guidance the empty one."""
        texts = [source.caption(index) for source in sources if source is not None for index in range(len(source))]
        validation = self.spec.training.validation
        if validation is not None and validation.prompts:
            texts += ["", *validation.prompts]
        return texts

    def _held_out_batches(self, held_out: Source | None, text: TextCache, hashes: FileHashes) -> BatchMaker | None:
        validation = self.spec.training.validation
        if held_out is None or validation is None:
            return None
        augmentation = Augmentation(random_crop=False, random_flip=False)
        latents = self._cached_latents(held_out, augmentation, hashes)
        draws = Draws(validation.seed)
        return BatchMaker(held_out, latents, text, self.family, draws, augmentation, self.world.device)

    def _cached_latents(self, source: Source, augmentation: Augmentation, hashes: FileHashes) -> LatentCache:
        cache = LatentCache(self.cache_dir, self.family, hashes, source, self.spec.training.resolution)
        cache.fill(augmentation.fixed_views(), self.world, self._progress("images"))
        return cache

    def _progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, of: self.say(f"{done}/{of} {what}")
