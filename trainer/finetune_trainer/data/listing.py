"""Lists the samples of a job's data sets, before their images are read. Called by `prepare`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune_contract.input_spec import Columns, DatasetSpec
from finetune_contract.run_spec import RunSpec
from finetune_trainer.data.sources.base import SampleSource
from finetune_trainer.data.sources.layout import JobContext
from finetune_trainer.data.sources.open import FILE_SUFFIXES, open_source, open_stream
from finetune_trainer.data.sources.shared import open_shared
from finetune_trainer.data.sources.stream import Stream
from finetune_trainer.data.training_sets import list_training_sets, naming_field
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DataError

MAX_HELD_OUT = 64
"""Number of samples of the held-out split that validation uses: the first ones."""
CLASS_IMAGES = "training.dreambooth.classImages"
HELD_OUT = "training.validation.split"


@dataclass(frozen=True)
class SampleLister:
    """Lists samples. All ranks take part.

    Attributes:
        spec: the run.
        world: the ranks.
        needs_captions: whether images without captions are refused.
        conditioning: whether the conditioning images are read.
        notes: folder that keeps the layouts of tables between runs.
        warn: receives warnings for the user.
    """

    spec: RunSpec
    world: World
    needs_captions: bool
    conditioning: bool
    notes: Path
    warn: Callable[[str], None]

    def open(self, dataset: DatasetSpec, max_samples: int | None) -> SampleSource:
        """Open a split whose images can be read at any time.

        Raises:
            DataError: it cannot be used, or has no samples.
        """
        opener = partial(open_source, dataset, dataset.split, max_samples, self.needs_captions, self._job)
        return open_shared(dataset.source, self.world, opener)

    def stream(self, dataset: DatasetSpec, max_samples: int | None) -> Stream:
        """Open a split that is read once, where it is stored.

        Raises:
            DataError: it cannot be used.
        """
        if not self.conditioning:
            columns = dataset.columns.model_copy(update={"conditioning": None})
            dataset = dataset.model_copy(update={"columns": columns})
        captions = self.needs_captions
        opener = partial(open_stream, dataset, dataset.split, max_samples, captions, self.notes, self._job)
        return open_shared(dataset.source, self.world, opener)

    def open_held_out(self) -> SampleSource | Stream | None:
        """Open the held-out split; a stream if the data set is streamed, None if the manifest names no such split.

        Raises:
            DataError: it cannot be used.
        """
        validation, dataset = self.spec.training.validation, self.spec.dataset
        if validation is None or validation.split is None:
            return None
        if dataset.source.endswith(FILE_SUFFIXES):
            raise DataError(
                f"{HELD_OUT}: {dataset.source} is a single file, which has no splits; name a folder with a subfolder "
                f"for each split as dataset.source, or omit {HELD_OUT}"
            )
        held_out = dataset.model_copy(update={"split": validation.split})
        with naming_field(HELD_OUT, split_only=True):
            return self.stream(held_out, MAX_HELD_OUT) if dataset.streaming else self.open(held_out, MAX_HELD_OUT)

    def open_class_images(self, limit: int) -> SampleSource | None:
        """Open the first of the user's own class images; None if the manifest names none.

        Raises:
            DataError: they cannot be used.
        """
        dreambooth = self.spec.training.dreambooth
        if dreambooth is None or dreambooth.class_prompt is None or dreambooth.class_images is None:
            return None
        dataset = DatasetSpec(source=dreambooth.class_images, columns=Columns(image=self.spec.dataset.columns.image))
        with naming_field(CLASS_IMAGES, whole=True):
            return open_source(dataset, dataset.split, limit, False, self._job)

    @property
    def _job(self) -> JobContext:
        """The job, for the layouts of data sets. Rank 0 warns for all ranks."""
        validation = self.spec.training.validation
        held_out = () if validation is None or validation.split is None else (validation.split,)
        splits = tuple(each.dataset.split for each in list_training_sets(self.spec.dataset))
        return JobContext((*splits, *held_out), self.warn if self.world.is_first else lambda _: None)
