"""Splits of data sets whose images have been scanned, and their mixture. Called by `prepare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from finetune_trainer.data.batches import Augmentation, Latents
from finetune_trainer.data.cache.image_scan import ImageScan
from finetune_trainer.data.mixture import MixedLatents, Mixture, MixturePart
from finetune_trainer.data.sources.base import SampleSet


@dataclass(frozen=True)
class DataSplit:
    """A split whose images have been scanned.

    Attributes:
        samples: the samples that are not broken.
        scan: the hashes and sizes of their images.
        latents: provides their posteriors, for the views of an augmentation.
        num_broken: number of broken samples that are left out.
        weights: factor of the loss of each sample; None if all are 1.
    """

    samples: SampleSet
    scan: ImageScan
    latents: Callable[[Augmentation], Latents]
    num_broken: int = 0
    weights: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None


def mix_splits(splits: Sequence[DataSplit], parts: Sequence[MixturePart]) -> DataSplit:
    """Return several splits as one, with the repeats and weights of the parts of a mixture."""
    mixture = Mixture(parts)
    if mixture.is_plain:
        return splits[0]
    starts = np.cumsum([0, *(len(split.samples) for split in splits[:-1])])
    return DataSplit(
        mixture,
        ImageScan.join([split.scan for split in splits]).take(starts[mixture.part_of] + mixture.index_of),
        lambda augmentation: MixedLatents(mixture, [split.latents(augmentation) for split in splits]),
        weights=mixture.weights,
    )
