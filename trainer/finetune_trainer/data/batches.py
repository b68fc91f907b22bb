"""Micro-batches: everything that a method needs of a few samples, with all their draws made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from finetune_trainer.data.draws import Draws, Purpose
from finetune_trainer.data.encode import Posterior, TextCache
from finetune_trainer.data.images import View
from finetune_trainer.data.order import SampleRef
from finetune_trainer.data.source import Source
from finetune_trainer.models.family import Family


@dataclass(frozen=True)
class Batch:
    """A micro-batch of n samples on the device.

    Attributes:
        latents: clean scaled latents, float32 (n, C, h, w).
        noise: standard normal, the same shape.
        timesteps: int64 (n,).
        captions: n captions.
        text: what the family's text encoder made of the captions, by name, first dimension n.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: tuple[str, ...]
    text: dict[str, Tensor]


class Latents(Protocol):
    """Where posteriors come from: the cache or the encoder itself."""

    def posterior(self, index: int, view: View) -> Posterior:
        """Posterior of an image in a view."""
        ...


@dataclass(frozen=True)
class Augmentation:
    """How a sample's view is drawn."""

    random_crop: bool
    random_flip: bool

    def view(self, draws: Draws, ref: SampleRef) -> View:
        """The view of one drawing of a sample."""
        left, top = draws.uniform(Purpose.CROP, ref, 2) if self.random_crop else (0.5, 0.5)
        flip = self.random_flip and draws.integer(Purpose.FLIP, ref, 2) == 1
        return View(left, top, flip)

    def fixed_views(self) -> list[View]:
        """All views that can be drawn, where they are few: without a random crop."""
        assert not self.random_crop
        return [View(), View(flip=True)] if self.random_flip else [View()]


@dataclass(frozen=True)
class BatchMaker:
    """Makes the micro-batches of a run."""

    source: Source
    latents: Latents
    text: TextCache
    family: Family
    draws: Draws
    augmentation: Augmentation
    device: torch.device

    def make(self, refs: Sequence[SampleRef], timesteps: Sequence[int] | None = None) -> Batch:
        """The micro-batch of these samples; timesteps are drawn unless given."""
        draws = self.draws
        if timesteps is None:
            count = self.family.schedule.num_timesteps
            timesteps = [draws.integer(Purpose.TIMESTEP, ref, count) for ref in refs]
        latents = torch.stack([self._sample(ref) for ref in refs])
        noise = torch.stack([draws.normal(Purpose.NOISE, ref, tuple(latents.shape[1:])) for ref in refs])
        captions = tuple(self.source.caption(ref.index) for ref in refs)
        return Batch(
            latents=latents.to(self.device),
            noise=noise.to(self.device),
            timesteps=torch.tensor(timesteps, dtype=torch.int64, device=self.device),
            captions=captions,
            text={name: value.to(self.device) for name, value in self.text.get(captions).items()},
        )

    def _sample(self, ref: SampleRef) -> Tensor:
        """Scaled latents (C, h, w) of one drawing of a sample."""
        posterior = self.latents.posterior(ref.index, self.augmentation.view(self.draws, ref))
        noise = self.draws.normal(Purpose.LATENT, ref, tuple(posterior.mean.shape))
        return posterior.sample(noise) * self.family.latent_scale
