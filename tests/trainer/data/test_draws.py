"""Tests of keyed random draws."""

from __future__ import annotations

import pytest
import torch

from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef

REF = SampleRef(epoch=3, index=14)
SHAPE = (4, 8, 8)


def test_draw_depends_only_on_its_key() -> None:
    first = Draws(7).normal(Purpose.NOISE, REF, SHAPE)
    other = Draws(7)
    other.normal(Purpose.NOISE, SampleRef(0, 0), SHAPE)
    other.integer(Purpose.TIMESTEP, REF, 1000)
    assert torch.equal(first, other.normal(Purpose.NOISE, REF, SHAPE))
    assert first.dtype is torch.float32


def test_each_part_of_the_key_changes_the_draw() -> None:
    draws = [
        Draws(7).normal(Purpose.NOISE, REF, SHAPE),
        Draws(8).normal(Purpose.NOISE, REF, SHAPE),
        Draws(7).normal(Purpose.LATENT, REF, SHAPE),
        Draws(7).normal(Purpose.NOISE, SampleRef(4, 14), SHAPE),
        Draws(7).normal(Purpose.NOISE, SampleRef(3, 15), SHAPE),
    ]
    for number, one in enumerate(draws):
        for other in draws[:number]:
            assert (one - other).abs().min() > 0


def test_neighbouring_samples_have_independent_draws() -> None:
    """The counters of neighbouring samples are far enough apart that long draws never overlap."""
    one = Draws(7).normal(Purpose.NOISE, SampleRef(0, 1), (4, 128, 128)).flatten()
    other = Draws(7).normal(Purpose.NOISE, SampleRef(0, 2), (4, 128, 128)).flatten()
    assert len(set(one.tolist()) & set(other.tolist())) < 0.02 * len(one)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.02


def test_timesteps_cover_the_schedule() -> None:
    timesteps = [Draws(0).integer(Purpose.TIMESTEP, SampleRef(0, index), 1000) for index in range(4000)]
    assert min(timesteps) < 10
    assert max(timesteps) > 989
    assert abs(sum(timesteps) / 4000 - 499.5) < 20


def test_draws_are_stable_across_releases() -> None:
    """A run that resumes from a checkpoint of an older release makes the same draws."""
    draws = Draws(1)
    assert draws.integer(Purpose.TIMESTEP, SampleRef(2, 3), 1000) == 188
    assert draws.normal(Purpose.NOISE, SampleRef(2, 3), (2,)).tolist() == pytest.approx([0.61542642, -1.54307067])
