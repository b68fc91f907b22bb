"""Prepares the data of a run: opens the splits of the data set, fills the cache, and builds the batch makers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from finetune_contract.input_spec import Columns, DatasetSpec
from finetune_contract.methods import crops_at_centre
from finetune_contract.run_spec import RunSpec
from finetune_trainer.data.batches import Augmentation, BatchMaker, Conditioning, Latents, Prior
from finetune_trainer.data.cache.encode import LatentCache, LatentStore, LiveLatents, TextCache
from finetune_trainer.data.cache.image_scan import ImageScan, describe_broken, scan_images
from finetune_trainer.data.cache.records import RecordedSamples
from finetune_trainer.data.cache.sample_identity import SampleHasher, SampleIdentity
from finetune_trainer.data.cache.stream_map import StreamMap
from finetune_trainer.data.captions import Captions, OnePrompt, ShuffledTags
from finetune_trainer.data.hashes import FileHashes
from finetune_trainer.data.images.class_images import ClassImages
from finetune_trainer.data.mixture import JoinedSamples, MixturePart
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.data.sampling.noising import Noising
from finetune_trainer.data.sampling.shapes import Shapes
from finetune_trainer.data.sources.base import SampleSet, SampleSource
from finetune_trainer.data.sources.layout import JobContext
from finetune_trainer.data.sources.open import FILE_SUFFIXES, no_samples, open_source, open_stream
from finetune_trainer.data.sources.shared import open_shared
from finetune_trainer.data.sources.subset import KeptSampleSet, KeptSource
from finetune_trainer.data.splits import DataSplit, mix_splits
from finetune_trainer.data.training_sets import list_training_sets, naming_field
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DataError
from finetune_trainer.models.family import Family
from finetune_trainer.models.text import count_cut

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

    def run(self) -> PreparedData:
        """Open the data set, and compute the outputs of the encoders that the cache lacks.

        Raises:
            DataError: the data set cannot be used as specified.
            StorageError: the cache cannot be written.
        """
        training = self.spec.training
        hashes = FileHashes(self.cache_dir / "hashes.json")
        train = self._open_train(hashes)
        self.check_length(len(train.samples))
        held_out = self._open_held_out(hashes)
        self._warn_of_cut_captions(train)
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
                prior=self._prior(text, hashes),
                conditioning=self._conditioning(training.controlnet.conditioning_dropout if training.controlnet else 0),
            ),
            self._held_out_batches(held_out, text),
            text,
        )
        if self.world.is_first:
            hashes.save()
        return prepared

    def _warn_of_cut_captions(self, train: DataSplit) -> None:
        """Warn once, on rank 0, with the number of captions that the text encoders cannot read to their end."""
        if not self.world.is_first:
            return
        settings, captions = self.family.text_settings, sorted(set(self.requirements.captions.every(train.samples)))
        cut = count_cut(self.family.load_tokenizers(), captions, settings)
        if cut:
            remedy = "" if settings.num_chunks > 1 else ", or write training.longCaptions: chunk for 225 tokens"
            self.warn(f"{cut} of {len(captions)} captions are too long, and their ends are cut; shorten them{remedy}")

    @property
    def _shapes(self) -> Shapes:
        return Shapes(self.spec.training.resolution, self.spec.training.aspect_buckets)

    def _scan(self, source: SampleSource, hashes: FileHashes) -> ImageScan:
        return scan_images(
            len(source), source.open, self.cache_dir, hashes, self.world, self._progress("images scanned")
        )

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

    @property
    def _job(self) -> JobContext:
        """The job, for the layouts of data sets. Rank 0 warns for all ranks."""
        validation = self.spec.training.validation
        held_out = () if validation is None or validation.split is None else (validation.split,)
        splits = tuple(each.dataset.split for each in list_training_sets(self.spec.dataset))
        return JobContext((*splits, *held_out), self.warn if self.world.is_first else lambda _: None)

    def _open_set(
        self,
        dataset: DatasetSpec,
        hashes: FileHashes,
        num_broken: int,
        record: Callable[[SampleIdentity, SampleSet], None],
    ) -> DataSplit:
        """Open one data set whose images can be read at any time; `num_broken` images of others are broken."""
        source = self._open(dataset, dataset.split, dataset.max_samples, self.requirements.needs_captions)
        scan = self._scan(source, hashes)
        broken = set(scan.broken)
        condition_ids: Sequence[str] = ("",) * len(source)
        if self.requirements.conditioning:
            progress = self._progress("conditioning images scanned")
            opener = source.open_conditioning
            conditions = scan_images(len(source), opener, self.cache_dir, hashes, self.world, progress)
            condition_ids = conditions.ids
            broken |= set(conditions.broken)
        reads_captions = not isinstance(self.requirements.captions, OnePrompt)
        record(self._identify(source, scan.ids, condition_ids, reads_captions), source)
        if broken:
            self._check_broken(source, sorted(broken), num_broken)
            source, scan = KeptSource(source, sorted(broken)), scan.without(sorted(broken))
        return dataclasses.replace(self._make_split(source, scan, hashes), num_broken=len(broken))

    def _open(self, dataset: DatasetSpec, split: str, max_samples: int | None, needs_captions: bool) -> SampleSource:
        """Open a split whose images can be read at any time."""
        opener = partial(open_source, dataset, split, max_samples, needs_captions, self._job)
        return open_shared(dataset.source, self.world, opener)

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
        samples, scan, broken, store = self._stream(dataset, dataset.max_samples, views, hashes, record)
        kept: SampleSet = samples
        if broken:
            self._check_broken(samples, broken, num_broken)
            kept, scan = KeptSampleSet(samples, broken), scan.without(broken)
        return DataSplit(kept, scan, lambda _: LatentCache(store, scan.ids), num_broken=len(broken))

    def _stream(
        self,
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
        if not self.requirements.conditioning:
            columns = dataset.columns.model_copy(update={"conditioning": None})
            dataset = dataset.model_copy(update={"columns": columns})
        notes, needs_captions = self.cache_dir / "tables", self.requirements.needs_captions
        opener = partial(open_stream, dataset, dataset.split, max_samples, needs_captions, notes, self._job)
        stream = open_shared(dataset.source, self.world, opener)
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

    def _prior(self, text: TextCache, hashes: FileHashes) -> Prior | None:
        """Return the class images if the manifest specifies prior preservation."""
        training = self.spec.training
        spec = training.dreambooth
        if spec is None or spec.class_prompt is None:
            return None
        parts = [] if spec.class_images is None else [self._open_class_images(spec.class_images, hashes)]
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

    def _open_class_images(self, location: str, hashes: FileHashes) -> DataSplit:
        """Open the user's own class images, at most as many as the manifest specifies, without broken ones."""
        field, spec = "training.dreambooth.classImages", self.spec.training.dreambooth
        assert spec is not None
        columns = Columns(image=self.spec.dataset.columns.image)
        dataset, limit = DatasetSpec(source=location, columns=columns), spec.num_class_images
        with naming_field(field, whole=True):
            while True:
                source: SampleSource = open_source(dataset, dataset.split, limit, False, self._job)
                scan = self._scan(source, hashes)
                num_lacking = spec.num_class_images - (len(source) - len(scan.broken))
                if num_lacking <= 0 or len(source) < limit:
                    break
                limit += num_lacking
        self.record_class_images(self._identify(source, scan.ids, ("",) * len(source), reads_captions=False), source)
        if scan.broken:
            if self.world.is_first:
                self.warn(describe_broken(source, scan.broken).replace("dataset.source", field, 1))
            source, scan = KeptSource(source, scan.broken), scan.without(scan.broken)
        return self._make_split(source, scan, hashes)

    def _conditioning(self, dropout: float) -> Conditioning | None:
        return Conditioning(self._shapes, dropout) if self.requirements.conditioning else None

    def _open_held_out(self, hashes: FileHashes) -> DataSplit | None:
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
            source = self._open(dataset, validation.split, MAX_HELD_OUT, self.requirements.needs_captions)
            return self._make_split(source, self._scan(source, hashes), hashes)
        held_out = dataset.model_copy(update={"split": validation.split})
        samples, scan, broken, store = self._stream(held_out, MAX_HELD_OUT, _PLAIN, hashes)
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
