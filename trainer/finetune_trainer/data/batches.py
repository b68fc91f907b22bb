"""Micro-batches: everything that a method needs of a few samples, including all their random draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune_trainer.data.cache.encode import Posterior
from finetune_trainer.data.captions import Captions, OwnCaptions
from finetune_trainer.data.images.decoding import CropView, decode_conditioning, micro_conditioning, to_pixels
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.noising import Noising
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.data.sampling.shapes import Shapes, Size
from finetune_trainer.data.sources.base import SampleSet
from finetune_trainer.models.family import IMAGE_SIZES, Family
from finetune_trainer.transfers import to_device

_PRIOR_OFFSET = 1 << 40
"""Added to the index of a sample in the keys of the draws for its class image, so that all keys are different."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of n samples on the device.

    Attributes:
        latents: clean scaled latents in the family's shape, float32 (n, ...).
        noise: the noise of the training target, the same shape.
        timesteps: int64 (n,).
        captions: n captions.
        text: outputs of the family's text encoder for the captions, by name, first dimension n; only the sizes if
            the method encodes captions itself.
        mixed: the noise that is added to the latents; None if it is `noise`.
        weights: weight of each sample's loss, float32 (n,); None if all are 1.
        num_prior: number of class images, the last ones of the n samples.
        conditioning: ControlNet's condition, float32 (n, 3, H, W) in [0, 1].
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: tuple[str, ...]
    text: dict[str, Tensor]
    mixed: Tensor | None = None
    weights: Tensor | None = None
    conditioning: Tensor | None = None
    num_prior: int = 0


class Latents(Protocol):
    """Provides posteriors: the cache or the encoder itself."""

    def posterior(self, index: int, view: CropView) -> Posterior:
        """Return the posterior of an image in a view."""
        ...


class Texts(Protocol):
    """Provides embeddings: the cache, or the method that trains the encoder."""

    def get(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings of captions by name, stacked (n, ...)."""
        ...


@dataclass(frozen=True)
class Augmentation:
    """Options for drawing the view of a sample."""

    random_crop: bool
    random_flip: bool

    def view(self, draws: Draws, ref: SampleRef) -> CropView:
        """Draw the view for one use of a sample."""
        left, top = draws.uniform(Purpose.CROP, ref, 2) if self.random_crop else (0.5, 0.5)
        flip = self.random_flip and draws.integer(Purpose.FLIP, ref, 2) == 1
        return CropView(left, top, flip)

    def fixed_views(self) -> list[CropView]:
        """Return all views that can be drawn. Random crops have no such list."""
        assert not self.random_crop
        return [CropView(), CropView(flip=True)] if self.random_flip else [CropView()]


@dataclass(frozen=True)
class Sample:
    """One use of a sample, on the CPU; see `Batch`."""

    latents: Tensor
    noise: Tensor
    mixed: Tensor
    timestep: int
    caption: str
    sizes: Tensor
    weight: float
    conditioning: Tensor | None


@dataclass(frozen=True)
class Conditioning:
    """Reads ControlNet's condition from the source, in the same view as the image.

    Attributes:
        shapes: the shapes of the images.
        dropout: fraction of uses that get an empty condition.
    """

    shapes: Shapes
    dropout: float = 0.0

    def read(self, source: SampleSet, ref: SampleRef, view: CropView, size: Size, draws: Draws) -> Tensor:
        """Read the condition for one use of a sample whose image has `size`; float32 (3, H, W) in [0, 1]."""
        width, height = self.shapes.of(size)
        if self.dropout > 0 and draws.uniform(Purpose.CONDITION, ref, 1)[0] < self.dropout:
            return torch.zeros(3, height, width)
        image = decode_conditioning(source, ref.index)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        return (to_pixels(image, (width, height), view, Image.Resampling.BILINEAR) + 1) / 2


@dataclass(frozen=True)
class Prior:
    """Class images for prior preservation: one for each sample.

    Attributes:
        batches: makes the samples of class images.
        weight: weight of their loss.
    """

    batches: BatchMaker
    weight: float

    def sample(self, draws: Draws, ref: SampleRef) -> Sample:
        """Return the class image for one use of a sample."""
        index = draws.integer(Purpose.PRIOR, ref, len(self.batches.source))
        key = SampleRef(ref.epoch, _PRIOR_OFFSET + ref.index)
        return self.batches.sample(index, key, None, self.weight)


@dataclass(frozen=True)
class BatchMaker:
    """Makes the micro-batches of a run.

    Attributes:
        source: the data set.
        latents: provides the posteriors of images.
        text: provides embeddings; None if the method encodes captions itself.
        family: the base model.
        draws: the random draws of the run.
        augmentation: options for drawing views.
        device: the device of the batches.
        shapes: the shapes of the images.
        sizes: width and height of every image, int32 (n, 2); None if there is only one shape.
        captions: chooses each sample's caption.
        caption_dropout: fraction of uses with the empty caption.
        noising: draws noise and timesteps.
        prior: class images for prior preservation.
        weights: factor of the loss of each sample of the source; None if all are 1.
        conditioning: reads ControlNet's condition.
    """

    source: SampleSet
    latents: Latents
    text: Texts | None
    family: Family
    draws: Draws
    augmentation: Augmentation
    device: torch.device
    shapes: Shapes
    sizes: np.ndarray[tuple[int, int], np.dtype[np.int32]] | None = None
    captions: Captions = field(default_factory=OwnCaptions)
    caption_dropout: float = 0.0
    noising: Noising = field(default_factory=Noising)
    prior: Prior | None = None
    weights: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
    conditioning: Conditioning | None = None

    def shape(self, index: int) -> Size:
        """Return the width and height at which a sample is trained. All samples of a batch have the same shape."""
        if self.sizes is None:
            return (self.shapes.resolution, self.shapes.resolution)
        width, height = self.sizes[index].tolist()
        return self.shapes.of((width, height))

    def make(self, refs: Sequence[SampleRef], timesteps: Sequence[int] | None = None) -> Batch:
        """Make the micro-batch of these samples, followed by their class images. Timesteps are drawn unless given."""
        given = [None] * len(refs) if timesteps is None else timesteps
        samples = [
            self.sample(ref.index, ref, timestep, self._weight(ref.index))
            for ref, timestep in zip(refs, given, strict=True)
        ]
        if self.prior is not None:
            samples += [self.prior.sample(self.draws, ref) for ref in refs]
        captions = tuple(sample.caption for sample in samples)
        text = {} if self.text is None else self.text.get(captions)
        text[IMAGE_SIZES] = torch.stack([sample.sizes for sample in samples])
        conditions = [sample.conditioning for sample in samples if sample.conditioning is not None]
        is_perturbed = any(sample.mixed is not sample.noise for sample in samples)
        return Batch(
            latents=self._stack([sample.latents for sample in samples]),
            noise=self._stack([sample.noise for sample in samples]),
            timesteps=to_device(torch.tensor([each.timestep for each in samples], dtype=torch.int64), self.device),
            captions=captions,
            text={name: to_device(value, self.device) for name, value in text.items()},
            mixed=self._stack([sample.mixed for sample in samples]) if is_perturbed else None,
            weights=self._stack_weights(samples),
            conditioning=self._stack(conditions) if conditions else None,
            num_prior=len(refs) if self.prior is not None else 0,
        )

    def sample(self, index: int, key: SampleRef, timestep: int | None = None, weight: float = 1.0) -> Sample:
        """Make one use of sample `index`, with the random draws of `key`."""
        draws = self.draws
        view = self.augmentation.view(draws, key)
        posterior = self.latents.posterior(index, view)
        normal = draws.normal(Purpose.LATENT, key, tuple(posterior.mean.shape))
        unscaled = posterior.sample(to_device(normal, posterior.mean.device))
        latents = self.family.scale_latents(unscaled)
        noise = self.noising.noise(draws, key, tuple(latents.shape))
        if timestep is None:
            timestep = self.noising.timestep(draws, key, self.family.objective.num_timesteps)
        return Sample(
            latents=latents,
            noise=noise,
            mixed=self.noising.mixed(draws, key, noise),
            timestep=timestep,
            caption=self._caption(SampleRef(key.epoch, index), key),
            sizes=micro_conditioning(posterior.size, self.shapes.of(posterior.size), view),
            weight=weight,
            conditioning=self._condition(SampleRef(key.epoch, index), view, posterior.size),
        )

    def _caption(self, ref: SampleRef, key: SampleRef) -> str:
        if self.caption_dropout > 0 and self.draws.uniform(Purpose.CAPTION, key, 1)[0] < self.caption_dropout:
            return ""
        return self.captions.caption(self.source, ref, self.draws)

    def _condition(self, ref: SampleRef, view: CropView, size: Size) -> Tensor | None:
        if self.conditioning is None:
            return None
        return self.conditioning.read(self.source, ref, view, size, self.draws)

    def _weight(self, index: int) -> float:
        return 1.0 if self.weights is None else float(self.weights[index])

    def _stack_weights(self, samples: Sequence[Sample]) -> Tensor | None:
        if self.prior is None and self.weights is None:
            return None
        return to_device(torch.tensor([sample.weight for sample in samples]), self.device)

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        if len({tensor.device for tensor in tensors}) > 1:
            # Some latents come from the cache, others from the encoder.
            tensors = [to_device(tensor, self.device) for tensor in tensors]
        return to_device(torch.stack(list(tensors)), self.device)
