"""Everything between the manifest's data set and micro-batches: open the splits, fill the cache, build the makers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_contract.run_spec import RunSpec
from finetune_trainer.data.batches import Augmentation, BatchMaker, Conditioning, Latents, Prior
from finetune_trainer.data.cache.encode import LatentCache, LatentStore, LiveLatents, TextCache
from finetune_trainer.data.cache.hashes import FileHashes
from finetune_trainer.data.cache.stream_map import StreamMap
from finetune_trainer.data.captions import Captions, OnePrompt
from finetune_trainer.data.images.class_images import ClassImages
from finetune_trainer.data.images.scan import ImageScan, KeptSamples, KeptSource, describe_broken, scan_images
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.data.sampling.noising import Noising
from finetune_trainer.data.sampling.shapes import Shapes
from finetune_trainer.data.sources.base import Samples, Source
from finetune_trainer.data.sources.open_source import open_source
from finetune_trainer.data.sources.open_stream import Opener
from finetune_trainer.data.sources.stream import StreamedSamples
from finetune_trainer.data.sources.table import SINGLE_FILES
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DataError
from finetune_trainer.models.family import Family

_PLAIN = Augmentation(random_crop=False, random_flip=False)
"""Of class images and of held-out ones."""
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
        text: embeddings of all captions and prompts, where the method does not compute them itself.
    """

    batches: BatchMaker
    held_out: BatchMaker | None
    text: TextCache


@dataclass(frozen=True)
class Demand:
    """What a method asks of the data.

    Attributes:
        captions: how samples are captioned.
        needs_captions: whether the data set must have captions.
        caches_text: whether embeddings are computed once; if not, the method encodes captions itself.
        conditioning: whether batches bring conditioning images.
    """

    captions: Captions
    needs_captions: bool = True
    caches_text: bool = True
    conditioning: bool = False


@dataclass(frozen=True)
class _Split:
    """A split whose images were looked at.

    Attributes:
        samples: those that are whole.
        census: what their images are.
        latents: where their posteriors come from, for views that are drawn in one way.
    """

    samples: Samples
    census: ImageScan
    latents: Callable[[Augmentation], Latents]


@dataclass(frozen=True)
class Preparation:
    """How the data of a run is made ready; all ranks take part.

    Attributes:
        spec: the run.
        demand: what the method asks for.
        family: the base model, whose frozen encoders are used.
        world: the ranks.
        dtype: number format of the text embeddings.
        cache_dir: folder shared by all jobs.
        say: told how far it is.
        warn: told what a person should know.
    """

    spec: RunSpec
    demand: Demand
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
        hashes = FileHashes(self.cache_dir / "hashes.json")
        train = self._stream_train(hashes) if dataset.streaming else self._open_train(hashes)
        held_out = self._open_held_out(hashes)
        text = TextCache(self.cache_dir, self.family, hashes, self.dtype)
        if self.demand.caches_text:
            text.fill(self._texts(train, held_out), self.world, self._progress("captions"))
        random_crop = not (training.center_crop or training.aspect_buckets or train.census.all_square)
        if random_crop:
            self.warn(LIVE_WARNING)
        augmentation = Augmentation(random_crop, training.random_flip)
        batches = self._batches(train, text, augmentation)
        prepared = PreparedData(
            dataclasses.replace(
                batches,
                caption_dropout=training.caption_dropout or 0.0,
                noising=Noising.of(training),
                prior=self._prior(text, hashes),
                conditioning=self._conditioning(training.controlnet.conditioning_dropout if training.controlnet else 0),
            ),
            self._held_out_batches(held_out, text),
            text,
        )
        if self.world.is_first:
            hashes.keep()
        return prepared

    @property
    def _shapes(self) -> Shapes:
        return Shapes(self.spec.training.resolution, self.spec.training.aspect_buckets)

    def _census(self, source: Source, hashes: FileHashes) -> ImageScan:
        return scan_images(
            len(source), source.open, self.cache_dir, hashes, self.world, self._progress("images looked at")
        )

    def _open_train(self, hashes: FileHashes) -> _Split:
        dataset = self.spec.dataset
        source: Source = open_source(dataset, dataset.split, dataset.max_samples, self.demand.needs_captions)
        census = self._census(source, hashes)
        broken = set(census.broken)
        if self.demand.conditioning:
            what = self._progress("conditioning images looked at")
            opener = source.open_conditioning
            broken |= set(scan_images(len(source), opener, self.cache_dir, hashes, self.world, what).broken)
        if broken:
            self._check_broken(source, sorted(broken))
            source, census = KeptSource(source, sorted(broken)), census.without(sorted(broken))
        return self._looked_at(source, census, hashes)

    def _stream_train(self, hashes: FileHashes) -> _Split:
        dataset = self.spec.dataset
        views = Augmentation(random_crop=False, random_flip=self.spec.training.random_flip)
        samples, census, broken, store = self._stream(dataset.split, dataset.max_samples, views, hashes)
        kept: Samples = samples
        if broken:
            self._check_broken(samples, broken)
            kept, census = KeptSamples(samples, broken), census.without(broken)
        return _Split(kept, census, lambda _: LatentCache(store, census.ids))

    def _stream(
        self, split: str, max_samples: int | None, augmentation: Augmentation, hashes: FileHashes
    ) -> tuple[StreamedSamples, ImageScan, list[int], LatentStore]:
        """Read a split where it lies, once; returns its broken samples, too.

        Raises:
            DataError: it cannot be used, or holds nothing.
        """
        dataset = self.spec.dataset
        if not self.demand.conditioning:
            columns = dataset.columns.model_copy(update={"conditioning": None})
            dataset = dataset.model_copy(update={"columns": columns})
        opener = Opener(dataset, split, max_samples, self.demand.needs_captions, self.cache_dir / "tables")
        store = LatentStore(self.cache_dir, self.family, hashes, self._shapes)
        views = augmentation.fixed_views()
        mapped = StreamMap(opener.open(), store, self.cache_dir, self.world, views, max_samples, self.say)
        samples, census, broken = mapped.run()
        if len(samples) == 0:
            raise DataError(f"dataset.source: split {split!r} of {dataset.source} holds no samples")
        return samples, census, broken, store

    def _check_broken(self, samples: Samples, broken: Sequence[int]) -> None:
        """Samples whose image or condition is broken are left out, as many as are allowed; every rank the same ones.

        Raises:
            DataError: there are more, or no others.
        """
        found, limit = describe_broken(samples, broken), self.spec.dataset.max_broken
        if len(broken) > limit or len(broken) == len(samples):
            raise DataError(
                f"{found}; dataset.maxBroken allows {limit}: mend or remove them, or write maxBroken: {len(broken)}"
            )
        if self.world.is_first:
            self.warn(f"{found}; training goes on without")

    def _looked_at(self, source: Source, census: ImageScan, hashes: FileHashes) -> _Split:
        """A source that can be read whenever it is wanted."""

        def latents(augmentation: Augmentation) -> Latents:
            if augmentation.random_crop:
                return LiveLatents(self.family.load_image_encoder(self.world.device), source, self._shapes)
            cache = LatentCache(LatentStore(self.cache_dir, self.family, hashes, self._shapes), census.ids)
            cache.fill(source, augmentation.fixed_views(), self.world, self._progress("images"))
            return cache

        return _Split(source, census, latents)

    def _batches(self, split: _Split, text: TextCache, augmentation: Augmentation) -> BatchMaker:
        """Plain batches of a split."""
        training = self.spec.training
        return BatchMaker(
            source=split.samples,
            latents=split.latents(augmentation),
            text=text if self.demand.caches_text else None,
            family=self.family,
            draws=Draws(training.seed),
            augmentation=augmentation,
            device=self.world.device,
            shapes=self._shapes,
            sizes=split.census.sizes if training.aspect_buckets else None,
            captions=self.demand.captions,
        )

    def _prior(self, text: TextCache, hashes: FileHashes) -> Prior | None:
        """Class images, where prior preservation is asked for."""
        training = self.spec.training
        spec = training.dreambooth
        if spec is None or spec.class_prompt is None:
            return None
        images = ClassImages(
            family=self.family,
            prompt=spec.class_prompt,
            count=spec.num_class_images,
            resolution=training.resolution,
            dtype=self.dtype,
            root=self.cache_dir,
            world=self.world,
            say=self._progress("class images"),
        ).open(hashes)
        split = self._looked_at(images, self._census(images, hashes), hashes)
        batches = self._batches(split, text, _PLAIN)
        batches = dataclasses.replace(batches, captions=OnePrompt(spec.class_prompt), noising=Noising.of(training))
        return Prior(batches, spec.prior_loss_weight)

    def _conditioning(self, dropout: float) -> Conditioning | None:
        return Conditioning(self._shapes, dropout) if self.demand.conditioning else None

    def _open_held_out(self, hashes: FileHashes) -> _Split | None:
        validation = self.spec.training.validation
        if validation is None or validation.split is None:
            return None
        dataset = self.spec.dataset
        if dataset.source.endswith(SINGLE_FILES):
            raise DataError(
                f"training.validation.split: {dataset.source} is one file, which has no splits; write a folder with a "
                "folder for each split as source, or leave split out"
            )
        if not dataset.streaming:
            source = open_source(dataset, validation.split, MAX_HELD_OUT, self.demand.needs_captions)
            return self._looked_at(source, self._census(source, hashes), hashes)
        samples, census, broken, store = self._stream(validation.split, MAX_HELD_OUT, _PLAIN, hashes)
        if broken:
            raise DataError(f"{describe_broken(samples, broken)}; the held-out split must be whole")
        return _Split(samples, census, lambda _: LatentCache(store, census.ids))

    def _texts(self, *splits: _Split | None) -> Sequence[str]:
        """All texts that the model is shown: captions, prompts, and for guidance and dropout the empty one."""
        training = self.spec.training
        texts = [text for split in splits if split is not None for text in self.demand.captions.every(split.samples)]
        if training.dreambooth is not None and training.dreambooth.class_prompt is not None:
            texts.append(training.dreambooth.class_prompt)
        if training.caption_dropout is not None:
            texts.append("")
        if training.validation is not None and training.validation.prompts:
            texts += ["", *training.validation.prompts]
        return texts

    def _held_out_batches(self, held_out: _Split | None, text: TextCache) -> BatchMaker | None:
        validation = self.spec.training.validation
        if held_out is None or validation is None:
            return None
        batches = self._batches(held_out, text, _PLAIN)
        return dataclasses.replace(batches, draws=Draws(validation.seed), conditioning=self._conditioning(0))

    def _progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, of: self.say(f"{done}/{of} {what}")
