"""Tests that the cache holds the outputs of the encoders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from finetune_contract.input_spec import DatasetSpec, ModelSpec
from finetune_trainer.data.batches import Augmentation, BatchMaker, Prior
from finetune_trainer.data.cache.encode import LatentCache, LatentStore, LiveLatents, TextCache
from finetune_trainer.data.cache.image_scan import scan_images
from finetune_trainer.data.hashes import FileHashes
from finetune_trainer.data.images.decoding import CropView
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.data.sampling.shapes import Shapes
from finetune_trainer.data.sources.base import SampleSource
from finetune_trainer.data.sources.open import open_source
from finetune_trainer.distributed.world import World
from finetune_trainer.methods.loss import diffusion_losses
from finetune_trainer.models.base import open_base
from finetune_trainer.models.family import Family
from testing.trainer import tiny

CPU = torch.device("cpu")
SINGLE_RANK = World(0, 1, 0, CPU)
SQUARE = Shapes(tiny.RESOLUTION)
VIEWS = [CropView(), CropView(flip=True)]


@pytest.fixture(name="family")
def _family(base: Path) -> Family:
    return open_base(ModelSpec(base=str(base)))


@pytest.fixture(name="source")
def _source(data: Path) -> SampleSource:
    return open_source(DatasetSpec(source=str(data)), "train")


@pytest.fixture(name="hashes")
def _hashes(tmp_path: Path) -> FileHashes:
    return FileHashes(tmp_path / "hashes.json")


def silent(done: int, of: int) -> None:
    del done, of


def latent_cache(folder: Path, family: Family, hashes: FileHashes, source: SampleSource) -> LatentCache:
    scan = scan_images(len(source), source.open, folder, hashes, SINGLE_RANK, silent)
    return LatentCache(LatentStore(folder, family, hashes, SQUARE), scan.ids)


def test_cached_latents_equal_live_latents(
    family: Family, source: SampleSource, hashes: FileHashes, tmp_path: Path
) -> None:
    cached = latent_cache(tmp_path, family, hashes, source)
    cached.fill(source, VIEWS, SINGLE_RANK, silent)
    live = LiveLatents(family.load_image_encoder(CPU), source, SQUARE)
    for index in range(len(source)):
        for view in VIEWS:
            expected, found = live.posterior(index, view), cached.posterior(index, view)
            assert torch.equal(expected.mean, found.mean)
            assert torch.equal(expected.std, found.std)
    assert not torch.equal(cached.posterior(0, VIEWS[0]).mean, cached.posterior(0, VIEWS[1]).mean)


def test_embeddings_equal_those_of_the_pipeline(family: Family, base: Path, hashes: FileHashes, tmp_path: Path) -> None:
    text = TextCache(tmp_path, family, hashes, torch.float32)
    captions = ["picture 1", "", "picture 1", "a caption of many more letters than the encoder takes"]
    text.fill(captions, SINGLE_RANK, silent)
    hidden = text.get(captions)["hidden"]
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    expected, _ = pipeline.encode_prompt(captions, CPU, 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(hidden, expected)
    assert torch.equal(hidden[0], hidden[2])


def test_samples_do_not_depend_on_the_batch_size(
    family: Family, source: SampleSource, hashes: FileHashes, tmp_path: Path
) -> None:
    text = TextCache(tmp_path, family, hashes, torch.float32)
    text.fill([source.captions(index)[0] for index in range(len(source))], SINGLE_RANK, silent)
    latents = latent_cache(tmp_path, family, hashes, source)
    latents.fill(source, VIEWS, SINGLE_RANK, silent)
    maker = BatchMaker(source, latents, text, family, Draws(3), Augmentation(False, True), CPU, SQUARE)
    refs = [SampleRef(epoch, index) for epoch in range(2) for index in range(3)]
    batch = maker.make(refs)
    for number, ref in enumerate(refs):
        single = maker.make([ref])
        assert torch.equal(single.latents[0], batch.latents[number])
        assert torch.equal(single.noise[0], batch.noise[number])
        assert single.timesteps[0] == batch.timesteps[number]
        assert torch.equal(single.text["hidden"][0], batch.text["hidden"][number])
    assert batch.captions == tuple(source.captions(ref.index)[0] for ref in refs)
    # The next epoch draws another sample of the posterior.
    assert not torch.equal(batch.latents[0], batch.latents[3])


def test_class_images_follow_the_samples_and_are_not_weighted_by_min_snr(
    family: Family, source: SampleSource, hashes: FileHashes, tmp_path: Path
) -> None:
    latents = latent_cache(tmp_path, family, hashes, source)
    latents.fill(source, VIEWS, SINGLE_RANK, silent)
    own = BatchMaker(source, latents, None, family, Draws(3), Augmentation(False, False), CPU, SQUARE)
    maker = dataclasses.replace(own, prior=Prior(own, weight=0.5))
    refs = [SampleRef(0, index) for index in range(3)]
    batch = maker.make(refs)
    assert batch.num_prior == 3
    assert torch.equal(batch.latents[:3], own.make(refs).latents)

    def losses(gamma: float | None) -> list[float]:
        found: list[float] = diffusion_losses(batch, family.objective, half, gamma).tolist()
        return found

    # A small gamma changes the weight of nearly every timestep.
    plain, weighted = losses(None), losses(1e-3)
    assert all(after < before for before, after in zip(plain[:3], weighted[:3], strict=True))
    assert weighted[3:] == plain[3:]
    without = dataclasses.replace(batch, weights=None)
    assert plain[3:] == [0.5 * each for each in diffusion_losses(without, family.objective, half, None).tolist()[3:]]


def half(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    del timesteps
    return noisy / 2


def test_flip_mirrors_half_of_the_images() -> None:
    views = [Augmentation(False, True).view(Draws(0), SampleRef(0, index)) for index in range(400)]
    assert 150 < sum(view.flip for view in views) < 250
    assert all(view in Augmentation(False, True).fixed_views() for view in views)


def test_random_crops_cover_all_positions() -> None:
    views = [Augmentation(True, False).view(Draws(0), SampleRef(0, index)) for index in range(200)]
    assert min(view.left for view in views) < 0.1
    assert max(view.top for view in views) > 0.9
    assert len({view.left for view in views}) == 200
