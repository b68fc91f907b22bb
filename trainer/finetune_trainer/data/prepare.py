"""Prepares the data of a run: opens the splits of the data set, fills the cache, and builds the batch makers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch

from finetune_contract.input_spec import DatasetSpec
from finetune_contract.methods import crops_at_centre
from finetune_contract.run_spec import RunSpec
from finetune_trainer.data.batches import Augmentation, BatchMaker, Conditioning, Latents, Prior
from finetune_trainer.data.cache.encode import LatentCache, LatentStore, LiveLatents, TextCache
from finetune_trainer.data.cache.image_scan import ImageScan, describe_broken, scan_images
from finetune_trainer.data.cache.records import RecordedSamples
from finetune_trainer.data.cache.sample_identity import SampleHasher, SampleIdentity
from finetune_trainer.data.cache.scan_index import FileChecks
from finetune_trainer.data.cache.stream_map import StreamMap
from finetune_trainer.data.captions import Captions, OnePrompt, ShuffledTags
from finetune_trainer.data.hashes import FileHashes, hash_text, noted_number
from finetune_trainer.data.images.class_images import ClassImages
from finetune_trainer.data.listing import CLASS_IMAGES, MAX_HELD_OUT, SampleLister
from finetune_trainer.data.mixture import JoinedSamples, MixturePart
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.data.sampling.noising import Noising
from finetune_trainer.data.sampling.shapes import Shapes
from finetune_trainer.data.sources.base import SampleSet, SampleSource
from finetune_trainer.data.sources.open import no_samples
from finetune_trainer.data.sources.stream import Stream
from finetune_trainer.data.sources.subset import KeptSampleSet, KeptSource
from finetune_trainer.data.splits import DataSplit, mix_splits
from finetune_trainer.data.training_sets import list_training_sets, naming_field
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DataError
from finetune_trainer.models.family import Family
from finetune_trainer.models.text import count_cut

_PLAIN = Augmentation(random_crop=False, random_flip=False)
"""Augmentation of class images and of held-out samples."""
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
        record: receives the identity of the samples before anything is computed from them.
        record_class_images: receives the identity of the user's own class images.
        check_length: checks the length of an epoch before anything is computed from the samples.
        checks: compares the files of the data set in the background, because an earlier attempt has recorded its
            identity; None: they are compared before anything is computed from them.
    """

    spec: RunSpec
    requirements: DataRequirements
    family: Family
    world: World
    dtype: torch.dtype
    cache_dir: Path
    report: Callable[[str], None]
    warn: Callable[[str], None]
    record: Callable[[SampleIdentity, SampleSet], None] = lambda found, samples: None
    record_class_images: Callable[[SampleIdentity, SampleSet], None] = lambda found, samples: None
    check_length: Callable[[int], None] = lambda num_samples: None
    checks: FileChecks | None = None

    def run(self) -> PreparedData:
        """Open the data set, and compute the outputs of the encoders that the cache lacks.

        Raises:
            DataError: the data set cannot be used as specified.
            StorageError: the cache cannot be written.
        """
        training = self.spec.training
        hashes = FileHashes(self.cache_dir / "hashes.json")
        # Everything is listed before the images of the training split are read, which may take hours.
        listed = self._lister.open_held_out()
        class_images = self._lister.open_class_images(self._num_class_images)
        train = self._open_train(hashes)
        self.check_length(len(train.samples))
        held_out = self._scan_held_out(listed, hashes)
        self._warn_of_cut_captions(train, hashes)
        text = TextCache(self.cache_dir, self.family, hashes, self.dtype)
        if self.requirements.caches_text:
            shuffles = self.spec.dataset.shuffle_tags is not None
            texts = self._texts(None if shuffles else train, held_out)
            text.fill(texts, self.world, self._progress("captions"))
        random_crop = not (crops_at_centre(training) or training.aspect_buckets or train.scan.all_square)
        if random_crop:
            self.warn(LIVE_WARNING)
        augmentation = Augmentation(random_crop, training.random_flip)
        batches = self._batches(train, text, augmentation)
        if (shuffled := self.spec.dataset.shuffle_tags) is not None:
            live = text.live(self.world.device) if self.requirements.caches_text else None
            captions = ShuffledTags(self.requirements.captions, shuffled)
            batches = dataclasses.replace(batches, captions=captions, text=live)
        prepared = PreparedData(
            dataclasses.replace(
                batches,
                caption_dropout=training.caption_dropout or 0.0,
                noising=Noising.of(training),
                prior=self._prior(class_images, text, hashes),
                conditioning=self._conditioning(training.controlnet.conditioning_dropout if training.controlnet else 0),
            ),
            self._held_out_batches(held_out, text),
            text,
        )
        if self.world.is_first:
            hashes.save()
        return prepared

    def _warn_of_cut_captions(self, train: DataSplit, hashes: FileHashes) -> None:
        """Warn once, on rank 0, with the number of captions that the text encoders cannot read to their end."""
        if not self.world.is_first:
            return
        settings, captions = self.family.text_settings, sorted(set(self.requirements.captions.every(train.samples)))
        encoders = hashes.of_files(self.family.text_encoder_files())
        note = self.cache_dir / "captions" / hash_text("cut", encoders, *settings.key, *captions)[:32]
        if cut := noted_number(note, lambda: count_cut(self.family.load_tokenizers(), captions, settings)):
            remedy = "" if settings.num_chunks > 1 else ", or write training.longCaptions: chunk for 225 tokens"
            self.warn(f"{cut} of {len(captions)} captions are too long, and their ends are cut; shorten them{remedy}")

    @property
    def _shapes(self) -> Shapes:
        return Shapes(self.spec.training.resolution, self.spec.training.aspect_buckets)

    def _scan(self, source: SampleSource, hashes: FileHashes, checks: FileChecks | None = None) -> ImageScan:
        progress = self._progress("images scanned")
        files = _list_files(len(source), source.file)
        return scan_images(len(source), source.open, self.cache_dir, hashes, self.world, progress, files, checks)

    def _open_train(self, hashes: FileHashes) -> DataSplit:
        """Open the data sets to train on, as one."""
        found: list[tuple[SampleIdentity, SampleSet]] = []
        opened: list[DataSplit] = []

        def record(identity: SampleIdentity, samples: SampleSet) -> None:
            found.append((identity, samples))

        training_sets = list_training_sets(self.spec.dataset)
        for each in training_sets:
            num_broken = sum(split.num_broken for split in opened)
            with naming_field(each.field):
                if each.dataset.streaming:
                    opened.append(self._stream_set(each.dataset, hashes, num_broken, record))
                else:
                    opened.append(self._open_set(each.dataset, hashes, num_broken, record))
        self.record(
            SampleIdentity.join([identity for identity, _ in found]), JoinedSamples([each for _, each in found])
        )
        return mix_splits(
            opened,
            [
                MixturePart(split.samples, each.repeats, each.weight)
                for split, each in zip(opened, training_sets, strict=True)
            ],
        )

    @cached_property
    def _lister(self) -> SampleLister:
        requirements = self.requirements
        notes, captions = self.cache_dir / "tables", requirements.needs_captions
        return SampleLister(self.spec, self.world, captions, requirements.conditioning, notes, self.warn)

    @property
    def _num_class_images(self) -> int:
        dreambooth = self.spec.training.dreambooth
        return 0 if dreambooth is None else dreambooth.num_class_images

    def _open_set(
        self,
        dataset: DatasetSpec,
        hashes: FileHashes,
        num_broken: int,
        record: Callable[[SampleIdentity, SampleSet], None],
    ) -> DataSplit:
        """Open one data set whose images can be read at any time; `num_broken` images of others are broken."""
        source = self._lister.open(dataset, dataset.max_samples)
        scan = self._scan(source, hashes, self.checks)
        broken = set(scan.broken)
        condition_ids: Sequence[str] = ("",) * len(source)
        if self.requirements.conditioning:
            progress = self._progress("conditioning images scanned")
            opener, count = source.open_conditioning, len(source)
            files = _list_files(count, source.conditioning_file)
            conditions = scan_images(count, opener, self.cache_dir, hashes, self.world, progress, files, self.checks)
            condition_ids = conditions.ids
            broken |= set(conditions.broken)
        reads_captions = not isinstance(self.requirements.captions, OnePrompt)
        record(self._identify(source, scan.ids, condition_ids, reads_captions), source)
        if broken:
            self._check_broken(source, sorted(broken), num_broken)
            source, scan = KeptSource(source, sorted(broken)), scan.without(sorted(broken))
        return dataclasses.replace(self._make_split(source, scan, hashes), num_broken=len(broken))

    @staticmethod
    def _identify(
        source: SampleSource, image_ids: Sequence[str], condition_ids: Sequence[str], reads_captions: bool
    ) -> SampleIdentity:
        """Return the identity of the samples, broken ones included."""
        hasher = SampleHasher()
        for index, ids in enumerate(zip(image_ids, condition_ids, strict=True)):
            hasher.add(*ids, source.repeats(index), source.captions(index) if reads_captions else ())
        return hasher.identity

    def _stream_set(
        self,
        dataset: DatasetSpec,
        hashes: FileHashes,
        num_broken: int,
        record: Callable[[SampleIdentity, SampleSet], None],
    ) -> DataSplit:
        """Read one data set where it is stored; `num_broken` images of others are broken."""
        views = Augmentation(random_crop=False, random_flip=self.spec.training.random_flip)
        stream = self._lister.stream(dataset, dataset.max_samples)
        samples, scan, broken, store = self._read_stream(stream, dataset, dataset.max_samples, views, hashes, record)
        kept: SampleSet = samples
        if broken:
            self._check_broken(samples, broken, num_broken)
            kept, scan = KeptSampleSet(samples, broken), scan.without(broken)
        return DataSplit(kept, scan, lambda _: LatentCache(store, scan.ids), num_broken=len(broken))

    def _read_stream(  # noqa: PLR0913, PLR0917  every argument differs between the calls
        self,
        stream: Stream,
        dataset: DatasetSpec,
        max_samples: int | None,
        augmentation: Augmentation,
        hashes: FileHashes,
        record: Callable[[SampleIdentity, SampleSet], None] = lambda found, samples: None,
    ) -> tuple[RecordedSamples, ImageScan, list[int], LatentStore]:
        """Read a split once, where it is stored.

        Returns:
            The samples, their image scan, the indices of the broken ones, and the store of their posteriors.

        Raises:
            DataError: it cannot be used, or has no samples.
        """
        store = LatentStore(self.cache_dir, self.family, hashes, self._shapes)
        views = augmentation.fixed_views()
        mapped = StreamMap(stream, store, self.cache_dir, self.world, views, max_samples, self.report)
        samples, scan, broken = mapped.run()
        record(mapped.identity, samples)
        if len(samples) == 0:
            raise DataError(no_samples(dataset, dataset.split))
        return samples, scan, broken, store

    def _check_broken(self, samples: SampleSet, broken: Sequence[int], num_others: int) -> None:
        """Check that the broken samples may be skipped. All ranks get the same result.

        Raises:
            DataError: there are more of them than the manifest allows, or no other samples.
        """
        found, limit = describe_broken(samples, broken), self.spec.dataset.max_broken
        if len(broken) == len(samples):
            raise DataError(f"{found}; replace them: training needs at least one image")
        total = num_others + len(broken)
        if total > limit:
            others = f", and {num_others} of other data sets" if num_others else ""
            raise DataError(
                f"{found}{others}; dataset.maxBroken allows {limit}: replace or remove them, or write maxBroken: "
                f"{total}"
            )
        if self.world.is_first:
            self.warn(f"{found}; training continues without them")

    def _make_split(self, source: SampleSource, scan: ImageScan, hashes: FileHashes) -> DataSplit:
        """Return the split of a source whose images can be read at any time."""

        def latents(augmentation: Augmentation) -> Latents:
            if augmentation.random_crop:
                return LiveLatents(self.family.load_image_encoder(self.world.device), source, self._shapes)
            cache = LatentCache(LatentStore(self.cache_dir, self.family, hashes, self._shapes), scan.ids)
            cache.fill(source, augmentation.fixed_views(), self.world, self._progress("images"))
            return cache

        return DataSplit(source, scan, latents)

    def _batches(self, split: DataSplit, text: TextCache, augmentation: Augmentation) -> BatchMaker:
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
            weights=split.weights,
            captions=self.requirements.captions,
        )

    def _prior(self, own: SampleSource | None, text: TextCache, hashes: FileHashes) -> Prior | None:
        """Return the class images, the user's own ones first, if the manifest specifies prior preservation."""
        training = self.spec.training
        spec = training.dreambooth
        if spec is None or spec.class_prompt is None:
            return None
        parts = [] if own is None else [self._scan_class_images(own, hashes)]
        num_missing = spec.num_class_images - sum(len(part.samples) for part in parts)
        if num_missing > 0:
            images = ClassImages(
                family=self.family,
                prompt=spec.class_prompt,
                count=num_missing,
                resolution=training.resolution,
                dtype=self.dtype,
                root=self.cache_dir,
                world=self.world,
                progress=self._progress("class images"),
            ).open(hashes)
            parts.append(self._make_split(images, self._scan(images, hashes), hashes))
        split = mix_splits(parts, [MixturePart(part.samples) for part in parts])
        batches = self._batches(split, text, _PLAIN)
        batches = dataclasses.replace(batches, captions=OnePrompt(spec.class_prompt), noising=Noising.of(training))
        return Prior(batches, spec.prior_loss_weight)

    def _scan_class_images(self, source: SampleSource, hashes: FileHashes) -> DataSplit:
        """Scan the user's own class images, and open more of them in the place of broken ones."""
        limit = self._num_class_images
        with naming_field(CLASS_IMAGES, whole=True):
            while True:
                scan = self._scan(source, hashes)
                num_lacking = self._num_class_images - (len(source) - len(scan.broken))
                if num_lacking <= 0 or len(source) < limit:
                    break
                limit += num_lacking
                source = self._lister.open_class_images(limit) or source
        self.record_class_images(self._identify(source, scan.ids, ("",) * len(source), reads_captions=False), source)
        if scan.broken:
            if self.world.is_first:
                self.warn(describe_broken(source, scan.broken).replace("dataset.source", CLASS_IMAGES, 1))
            source, scan = KeptSource(source, scan.broken), scan.without(scan.broken)
        return self._make_split(source, scan, hashes)

    def _conditioning(self, dropout: float) -> Conditioning | None:
        return Conditioning(self._shapes, dropout) if self.requirements.conditioning else None

    def _scan_held_out(self, listed: SampleSource | Stream | None, hashes: FileHashes) -> DataSplit | None:
        validation = self.spec.training.validation
        if listed is None or validation is None or validation.split is None:
            return None
        if not self.spec.dataset.streaming:
            source = cast("SampleSource", listed)
            return self._make_split(source, self._scan(source, hashes), hashes)
        stream = cast("Stream", listed)
        held_out = self.spec.dataset.model_copy(update={"split": validation.split})
        samples, scan, broken, store = self._read_stream(stream, held_out, MAX_HELD_OUT, _PLAIN, hashes)
        if broken:
            raise DataError(
                f"{describe_broken(samples, broken)}; replace or remove them: the held-out split must have none"
            )
        return DataSplit(samples, scan, lambda _: LatentCache(store, scan.ids))

    def _texts(self, *splits: DataSplit | None) -> Sequence[str]:
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

    def _held_out_batches(self, held_out: DataSplit | None, text: TextCache) -> BatchMaker | None:
        validation = self.spec.training.validation
        if held_out is None or validation is None:
            return None
        batches = self._batches(held_out, text, _PLAIN)
        return dataclasses.replace(batches, draws=Draws(validation.seed), conditioning=self._conditioning(0))

    def _progress(self, unit: str) -> Callable[[int, int], None]:
        return lambda done, total: self.report(f"{done}/{total} {unit}")


def _list_files(count: int, file_of: Callable[[int], Path | None]) -> list[Path] | None:
    """Return the files of all images; None if the images are not separate files."""
    files = [file_of(index) for index in range(count)]
    return [each for each in files if each is not None] if None not in files else None
