"""Prepares the data of a run: opens the splits of the data set, fills the cache, and builds the batch makers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_contract.run_spec import RunSpec
from finetune_trainer.data.batches import Augmentation, BatchMaker, Conditioning, Latents, Prior
from finetune_trainer.data.cache.encode import LatentCache, LatentStore, LiveLatents, TextCache
from finetune_trainer.data.cache.image_scan import ImageScan, describe_broken, scan_images
from finetune_trainer.data.cache.records import RecordedSamples
from finetune_trainer.data.cache.stream_map import StreamMap
from finetune_trainer.data.captions import Captions, OnePrompt
from finetune_trainer.data.hashes import FileHashes
from finetune_trainer.data.images.class_images import ClassImages
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.data.sampling.noising import Noising
from finetune_trainer.data.sampling.shapes import Shapes
from finetune_trainer.data.sources.base import SampleSet, SampleSource
from finetune_trainer.data.sources.open import FILE_SUFFIXES, no_samples, open_source, open_stream
from finetune_trainer.data.sources.subset import KeptSampleSet, KeptSource
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DataError
from finetune_trainer.models.family import Family

_PLAIN = Augmentation(random_crop=False, random_flip=False)
"""Augmentation of class images and of held-out samples."""
MAX_HELD_OUT = 64
"""Number of samples of the held-out split that validation uses: the first ones."""
LIVE_WARNING = (
    "training.centerCrop: images are not square and are cropped at random, so they are encoded again in every step; "
    "write centerCrop: true to encode them once"
)


@dataclass(frozen=True)
class PreparedData:
    """The data of training and validation.

    Attributes:
        batches: batches of the training split.
        held_out: batches of the held-out split, with separate random draws; None if the manifest names no such split.
        text: embeddings of all captions and prompts, unless the method computes them itself.
    """

    batches: BatchMaker
    held_out: BatchMaker | None
    text: TextCache


@dataclass(frozen=True)
class DataRequirements:
    """The requirements of a method on the data.

    Attributes:
        captions: chooses the captions of samples.
        needs_captions: whether the data set must have captions.
        caches_text: whether embeddings are computed once; if not, the method encodes captions itself.
        conditioning: whether batches contain conditioning images.
    """

    captions: Captions
    needs_captions: bool = True
    caches_text: bool = True
    conditioning: bool = False


@dataclass(frozen=True)
class _Split:
    """A split whose images have been scanned.

    Attributes:
        samples: the samples that are not broken.
        scan: the hashes and sizes of their images.
        latents: provides their posteriors, for the views of an augmentation.
    """

    samples: SampleSet
    scan: ImageScan
    latents: Callable[[Augmentation], Latents]


@dataclass(frozen=True)
class Preparation:
    """Prepares the data of a run. All ranks take part.

    Attributes:
        spec: the run.
        requirements: the requirements of the method.
        family: the base model with its frozen encoders.
        world: the ranks.
        dtype: number format of the text embeddings.
        cache_dir: the cache that all jobs share.
        report: receives lines on the progress.
        warn: receives warnings for the user.
    """

    spec: RunSpec
    requirements: DataRequirements
    family: Family
    world: World
    dtype: torch.dtype
    cache_dir: Path
    report: Callable[[str], None]
    warn: Callable[[str], None]

    def run(self) -> PreparedData:
        """Open the data set, and compute the outputs of the encoders that the cache lacks.

        Raises:
            DataError: the data set cannot be used as specified.
            StorageError: the cache cannot be written.
        """
        dataset, training = self.spec.dataset, self.spec.training
        hashes = FileHashes(self.cache_dir / "hashes.json")
        train = self._stream_train(hashes) if dataset.streaming else self._open_train(hashes)
        held_out = self._open_held_out(hashes)
        text = TextCache(self.cache_dir, self.family, hashes, self.dtype)
        if self.requirements.caches_text:
            text.fill(self._texts(train, held_out), self.world, self._progress("captions"))
        random_crop = not (training.center_crop or training.aspect_buckets or train.scan.all_square)
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
            hashes.save()
        return prepared

    @property
    def _shapes(self) -> Shapes:
        return Shapes(self.spec.training.resolution, self.spec.training.aspect_buckets)

    def _scan(self, source: SampleSource, hashes: FileHashes) -> ImageScan:
        return scan_images(
            len(source), source.open, self.cache_dir, hashes, self.world, self._progress("images scanned")
        )

    def _open_train(self, hashes: FileHashes) -> _Split:
        dataset = self.spec.dataset
        source: SampleSource = open_source(
            dataset, dataset.split, dataset.max_samples, self.requirements.needs_captions
        )
        scan = self._scan(source, hashes)
        broken = set(scan.broken)
        if self.requirements.conditioning:
            progress = self._progress("conditioning images scanned")
            opener = source.open_conditioning
            broken |= set(scan_images(len(source), opener, self.cache_dir, hashes, self.world, progress).broken)
        if broken:
            self._check_broken(source, sorted(broken))
            source, scan = KeptSource(source, sorted(broken)), scan.without(sorted(broken))
        return self._make_split(source, scan, hashes)

    def _stream_train(self, hashes: FileHashes) -> _Split:
        dataset = self.spec.dataset
        views = Augmentation(random_crop=False, random_flip=self.spec.training.random_flip)
        samples, scan, broken, store = self._stream(dataset.split, dataset.max_samples, views, hashes)
        kept: SampleSet = samples
        if broken:
            self._check_broken(samples, broken)
            kept, scan = KeptSampleSet(samples, broken), scan.without(broken)
        return _Split(kept, scan, lambda _: LatentCache(store, scan.ids))

    def _stream(
        self, split: str, max_samples: int | None, augmentation: Augmentation, hashes: FileHashes
    ) -> tuple[RecordedSamples, ImageScan, list[int], LatentStore]:
        """Read a split once, where it is stored.

        Returns:
            The samples, their image scan, the indices of the broken ones, and the store of their posteriors.

        Raises:
            DataError: it cannot be used, or has no samples.
        """
        dataset = self.spec.dataset
        if not self.requirements.conditioning:
            columns = dataset.columns.model_copy(update={"conditioning": None})
            dataset = dataset.model_copy(update={"columns": columns})
        stream = open_stream(dataset, split, max_samples, self.requirements.needs_captions, self.cache_dir / "tables")
        store = LatentStore(self.cache_dir, self.family, hashes, self._shapes)
        views = augmentation.fixed_views()
        mapped = StreamMap(stream, store, self.cache_dir, self.world, views, max_samples, self.report)
        samples, scan, broken = mapped.run()
        if len(samples) == 0:
            raise DataError(no_samples(dataset, split))
        return samples, scan, broken, store

    def _check_broken(self, samples: SampleSet, broken: Sequence[int]) -> None:
        """Check that the broken samples may be skipped. All ranks get the same result.

        Raises:
            DataError: there are more of them than the manifest allows, or no other samples.
        """
        found, limit = describe_broken(samples, broken), self.spec.dataset.max_broken
        if len(broken) == len(samples):
            raise DataError(f"{found}; replace them: training needs at least one image")
        if len(broken) > limit:
            raise DataError(
                f"{found}; dataset.maxBroken allows {limit}: replace or remove them, or write maxBroken: {len(broken)}"
            )
        if self.world.is_first:
            self.warn(f"{found}; training continues without them")

    def _make_split(self, source: SampleSource, scan: ImageScan, hashes: FileHashes) -> _Split:
        """Return the split of a source whose images can be read at any time."""

        def latents(augmentation: Augmentation) -> Latents:
            if augmentation.random_crop:
                return LiveLatents(self.family.load_image_encoder(self.world.device), source, self._shapes)
            cache = LatentCache(LatentStore(self.cache_dir, self.family, hashes, self._shapes), scan.ids)
            cache.fill(source, augmentation.fixed_views(), self.world, self._progress("images"))
            return cache

        return _Split(source, scan, latents)

    def _batches(self, split: _Split, text: TextCache, augmentation: Augmentation) -> BatchMaker:
        """Return the batch maker of a split, without the options of training."""
        training = self.spec.training
        return BatchMaker(
            source=split.samples,
            latents=split.latents(augmentation),
            text=text if self.requirements.caches_text else None,
            family=self.family,
            draws=Draws(training.seed),
            augmentation=augmentation,
            device=self.world.device,
            shapes=self._shapes,
            sizes=split.scan.sizes if training.aspect_buckets else None,
            captions=self.requirements.captions,
        )

    def _prior(self, text: TextCache, hashes: FileHashes) -> Prior | None:
        """Return the class images if the manifest specifies prior preservation."""
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
            progress=self._progress("class images"),
        ).open(hashes)
        split = self._make_split(images, self._scan(images, hashes), hashes)
        batches = self._batches(split, text, _PLAIN)
        batches = dataclasses.replace(batches, captions=OnePrompt(spec.class_prompt), noising=Noising.of(training))
        return Prior(batches, spec.prior_loss_weight)

    def _conditioning(self, dropout: float) -> Conditioning | None:
        return Conditioning(self._shapes, dropout) if self.requirements.conditioning else None

    def _open_held_out(self, hashes: FileHashes) -> _Split | None:
        validation = self.spec.training.validation
        if validation is None or validation.split is None:
            return None
        dataset = self.spec.dataset
        if dataset.source.endswith(FILE_SUFFIXES):
            raise DataError(
                f"training.validation.split: {dataset.source} is a single file, which has no splits; name a folder "
                "with a subfolder for each split as dataset.source, or omit training.validation.split"
            )
        if not dataset.streaming:
            source = open_source(dataset, validation.split, MAX_HELD_OUT, self.requirements.needs_captions)
            return self._make_split(source, self._scan(source, hashes), hashes)
        samples, scan, broken, store = self._stream(validation.split, MAX_HELD_OUT, _PLAIN, hashes)
        if broken:
            raise DataError(
                f"{describe_broken(samples, broken)}; replace or remove them: the held-out split must have none"
            )
        return _Split(samples, scan, lambda _: LatentCache(store, scan.ids))

    def _texts(self, *splits: _Split | None) -> Sequence[str]:
        """Return all texts that the model gets: captions, prompts, and the empty text for guidance and dropout."""
        training = self.spec.training
        texts = [
            text for split in splits if split is not None for text in self.requirements.captions.every(split.samples)
        ]
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

    def _progress(self, unit: str) -> Callable[[int, int], None]:
        return lambda done, total: self.report(f"{done}/{total} {unit}")
