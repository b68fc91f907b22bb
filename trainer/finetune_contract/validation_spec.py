"""The parts of `spec.training` that choose timesteps, and validate; see `spec`."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from finetune_contract.spec_model import Location, Prompt, SpecModel, Word

MAX_STEPS = 100_000_000
"""Most optimizer steps of a job."""
MAX_SEED = 2**32 - 1
"""Largest seed: all generators that are used accept 32 bits."""


class BiasStrategy(StrEnum):
    """Timesteps that are drawn more often."""

    EARLIER = "earlier"
    LATER = "later"
    RANGE = "range"


class TimestepBiasSpec(SpecModel):
    """Timesteps that are drawn more often than the others."""

    strategy: BiasStrategy = Field(
        description="Timesteps to draw more often: earlier, later, or the range from begin to end"
    )
    multiplier: float = Field(default=2.0, gt=0, le=1000, description="Factor by which they are drawn more often")
    portion: float = Field(default=0.25, gt=0, le=1, description="Share of the timesteps that earlier and later select")
    begin: int = Field(default=0, ge=0, le=100_000, description="First timestep of the range")
    end: int = Field(default=1000, ge=1, le=100_000, description="Timestep after the last one of the range")


class ValidationSpec(SpecModel):
    """Validation images and held-out loss."""

    prompts: tuple[Prompt, ...] = Field(
        default=(), max_length=64, description="Prompts whose images, before and after training, are shown in one grid"
    )
    images: tuple[Location, ...] = Field(
        default=(),
        max_length=64,
        description="Conditioning images of the prompts for ControlNet, one for each: paths or s3:// URLs; default: "
        "those of the first samples",
    )
    split: Word | None = Field(default=None, description="Held-out split whose loss, with fixed noise, is reported")
    steps: int | None = Field(
        default=None,
        ge=1,
        le=MAX_STEPS,
        description="Steps between validations; default: only at the start and at the end",
    )
    epochs: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Epochs between validations; alternatively write steps"
    )
    num_inference_steps: int = Field(default=25, ge=1, le=1000, description="Denoising steps of each image")
    guidance_scale: float = Field(default=7.5, ge=0, le=100, description="Scale of classifier-free guidance")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="Seed of the images and of the held-out noise")
