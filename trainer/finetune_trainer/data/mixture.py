"""Several data sets as one: each sample appears as often as an epoch uses it. Called by `prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from finetune_trainer.data.batches import Latents
from finetune_trainer.data.cache.encode import Posterior
from finetune_trainer.data.images.decoding import CropView
from finetune_trainer.data.sources.base import SampleSet


@dataclass(frozen=True)
class MixturePart:
    """One data set of a mixture.

    Attributes:
        samples: its samples.
        repeats: number of times that each epoch uses each of them, multiplied by the sample's own repeats.
        weight: factor of the loss of its samples.
    """

    samples: SampleSet
    repeats: int = 1
    weight: float = 1.0


class Mixture:
    """The samples of several data sets, one after the other; see `SampleSet`.

    Each use of a sample in an epoch has its own index, and so its own random draws.

    Args:
        parts: the data sets.
    """

    def __init__(self, parts: Sequence[MixturePart]) -> None:
        self._parts = parts
        counts = [
            np.array([part.repeats * part.samples.repeats(index) for index in range(len(part.samples))], dtype=np.int64)
            for part in parts
        ]
        self.index_of = np.concatenate([np.repeat(np.arange(len(count)), count) for count in counts])
        """Index of each sample in its part."""
        self.part_of = np.repeat(np.arange(len(parts)), [int(count.sum()) for count in counts])
        """Number of the part of each sample."""

    def __len__(self) -> int:
        return len(self.index_of)

    @property
    def is_plain(self) -> bool:
        """Return whether this is a single data set without repeats and weights."""
        return len(self._parts) == 1 and len(self) == len(self._parts[0].samples) and self._parts[0].weight == 1

    @property
    def weights(self) -> np.ndarray[tuple[int], np.dtype[np.float64]] | None:
        """Factor of the loss of each sample; None if all are 1."""
        by_part = np.array([part.weight for part in self._parts])
        return None if (by_part == 1).all() else by_part[self.part_of]

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of a sample's part, and its index in the part."""
        return int(self.part_of[index]), int(self.index_of[index])

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of a sample."""
        part, own = self.locate(index)
        return self._parts[part].samples.captions(own)

    def repeats(self, index: int) -> int:
        """Return 1: the repeats of a sample have an index each."""
        del index
        return 1

    def open_conditioning(self, index: int) -> IO[bytes]:
        """Open the encoded conditioning image of a sample."""
        part, own = self.locate(index)
        return self._parts[part].samples.open_conditioning(own)

    def name(self, index: int) -> str:
        """Return the name under which a user finds the sample."""
        part, own = self.locate(index)
        return self._parts[part].samples.name(own)


class JoinedSamples(Mixture):
    """The samples of several data sets, one after the other, each of them once."""

    def __init__(self, parts: Sequence[SampleSet]) -> None:
        super().__init__([MixturePart(part) for part in parts])
        counts = [len(part) for part in parts]
        self.index_of = np.concatenate([np.arange(count) for count in counts])
        self.part_of = np.repeat(np.arange(len(parts)), counts)


class MixedLatents:
    """The posteriors of the images of a mixture; see `Latents`.

    Args:
        mixture: the mixture.
        parts: the posteriors of each of its parts.
    """

    def __init__(self, mixture: Mixture, parts: Sequence[Latents]) -> None:
        self._mixture = mixture
        self.parts = parts

    def posterior(self, index: int, view: CropView) -> Posterior:
        """Return the posterior of an image in a view."""
        part, own = self._mixture.locate(index)
        return self.parts[part].posterior(own, view)
