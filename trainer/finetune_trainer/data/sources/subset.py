"""A data set without its broken samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from finetune_trainer.data.sources.base import SampleSet, SampleSource


class KeptSampleSet:
    """A data set without some of its samples; see `SampleSet`."""

    def __init__(self, samples: SampleSet, removed: Sequence[int]) -> None:
        self._samples = samples
        self._kept = np.delete(np.arange(len(samples)), list(removed))

    def __len__(self) -> int:
        return len(self._kept)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of a sample."""
        return self._samples.captions(int(self._kept[index]))

    def repeats(self, index: int) -> int:
        """Return the number of times that each epoch uses a sample."""
        return self._samples.repeats(int(self._kept[index]))

    def open_conditioning(self, index: int) -> IO[bytes]:
        """Open the encoded conditioning image of a sample."""
        return self._samples.open_conditioning(int(self._kept[index]))

    def name(self, index: int) -> str:
        """Return the name under which a user finds the sample."""
        return self._samples.name(int(self._kept[index]))


class KeptSource(KeptSampleSet):
    """A source without some of its samples; see `SampleSource`."""

    def __init__(self, source: SampleSource, removed: Sequence[int]) -> None:
        super().__init__(source, removed)
        self._source = source

    def open(self, index: int) -> IO[bytes]:
        """Open the encoded image of a sample."""
        return self._source.open(int(self._kept[index]))

    def file(self, index: int) -> Path | None:
        """Return the file that holds this image and nothing else; None if there is no such file."""
        return self._source.file(int(self._kept[index]))

    def conditioning_file(self, index: int) -> Path | None:
        """Return the file that holds this conditioning image and nothing else; None if there is no such file."""
        return self._source.conditioning_file(int(self._kept[index]))
