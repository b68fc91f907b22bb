"""The methods use only the interface `Family`: a denoiser without a UNet and latents of another shape train as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.batches import Batch
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.write import write_format
from finetune_trainer.methods.controlnet import ControlNet
from finetune_trainer.methods.full import Full
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.models.base import FAMILIES, open_base
from finetune_trainer.models.family import Family, ImageEncoder, SingleFile
from finetune_trainer.models.layouts.folder import PipelineFolder
from finetune_trainer.models.layouts.trained import TrainedPipeline
from finetune_trainer.models.sampling import draw_latents
from finetune_trainer.models.text import TextEncoder, TextSettings
from finetune_trainer.weights.lazy import LazyTensor
from testing.measure.architectures import RandomPipeline
from testing.trainer import tiny
from testing.trainer.methods import CPU

NUM_PATCHES, WIDTH = 9, 6


class FlowMatching:
    """Rectified flow (https://arxiv.org/abs/2209.03003): x_t = (1 - t) x_0 + t noise, target noise - x_0."""

    num_timesteps = 10

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        time = self._times(timesteps, latents)
        return (1 - time) * latents + time * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        del timesteps
        return noise - latents

    def loss_weights(self, timesteps: Tensor, snr_gamma: float | None) -> Tensor | None:
        del timesteps, snr_gamma
        return None

    def denoise(self, latents: Tensor, prediction: Tensor, timestep: int, next_timestep: int) -> Tensor:
        return latents + (next_timestep - timestep) / (self.num_timesteps - 1) * prediction

    def to(self, device: torch.device) -> FlowMatching:
        del device
        return self

    def _times(self, timesteps: Tensor, like: Tensor) -> Tensor:
        return (timesteps / (self.num_timesteps - 1)).view(-1, *([1] * (like.dim() - 1)))


class PatchDenoiser(nn.Module):
    """A denoiser on a sequence of patches, with one condition vector and a time in keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * WIDTH + 1, WIDTH)

    def forward(self, *, patches: Tensor, time: Tensor, style: Tensor) -> Tensor:
        size = patches.shape[:2]
        context = torch.cat([style, time.unsqueeze(-1)], dim=-1).unsqueeze(1)
        output: Tensor = self.layer(torch.cat([patches, context.expand(*size, -1)], dim=-1))
        return output


class PatchFamily:
    """A family with flow matching, latents (patches, width) and one text condition; see `Family`."""

    denoiser_name: ClassVar[str] = "transformer"
    compiled_blocks: ClassVar[frozenset[str]] = frozenset()
    single_file: ClassVar[SingleFile | None] = None
    objective = FlowMatching()
    pixels_per_latent = 8

    text_settings = TextSettings()

    def __init__(self, folder: Path, vae_folder: Path, variant: str | None) -> None:
        self.pipeline: PipelineFolder = RandomPipeline(folder, vae_folder)

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        return (width // 8 * (height // 8), WIDTH)

    def scale_latents(self, latents: Tensor) -> Tensor:
        return latents.flatten(1).T

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        return PatchDenoiser().to(dtype)

    def load_image_encoder(self, device: torch.device) -> ImageEncoder:
        raise NotImplementedError

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype = torch.float32) -> TextEncoder:
        raise NotImplementedError

    def denoiser_files(self) -> list[Path]:
        return []

    def image_encoder_files(self) -> list[Path]:
        return []

    def text_encoder_files(self) -> list[Path]:
        return []

    def load_tokenizers(self) -> list[Any]:
        return []

    def conditions(self, text: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        return {"style": text["style"].to(dtype)}

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        output: Tensor = denoiser(patches=noisy, time=timesteps.to(noisy.dtype), **conditions)
        return output

    def load_controlnet(self, denoiser: Any, folder: Path | None) -> Any:
        raise ConfigError("training.method: ControlNet is not supported on this base; write another method")

    def control(
        self, controlnet: Any, noisy: Tensor, timesteps: Tensor, images: Tensor, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def kohya_base_version(self) -> str:
        return "patches"

    def kohya_name(self, part: str, module: str) -> str:
        return f"{part}_{module}"

    def to_original(self, tensors: Callable[[str], Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
        raise KeyError("transformer")


def make_context(method: str) -> MethodContext:
    family: Family = PatchFamily(Path(), Path(), None)
    return MethodContext(family, TrainingSpec.model_validate({"method": method}), Draws(0), CPU, torch.float32)


def make_batch(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, count, NUM_PATCHES, WIDTH), generator=generator)
    timesteps = torch.arange(count)
    return Batch(latents, noise, timesteps, ("",) * count, {"style": torch.randn((count, WIDTH), generator=generator)})


def test_flow_matching_on_patches_has_the_loss_of_its_formula() -> None:
    method, batch = Full(make_context("Full")), make_batch()
    time = (batch.timesteps / 9).view(-1, 1, 1)
    noisy = (1 - time) * batch.latents + time * batch.noise
    reference = PatchFamily(Path(), Path(), None).load_denoiser(torch.float32)
    prediction = reference(patches=noisy, time=batch.timesteps.float(), style=batch.text["style"])
    expected = (prediction - (batch.noise - batch.latents)).square().mean((1, 2))
    torch.testing.assert_close(method.losses(batch), expected)


def test_family_without_a_unet_trains_samples_and_exports(tmp_path: Path) -> None:
    context = make_context("Full")
    method, batch = Full(context), make_batch()
    assert set(method.parameters()) == {"transformer.layer.weight", "transformer.layer.bias"}
    optimizer = torch.optim.AdamW(method.parameters().values(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = method.losses(batch).mean()
        losses.append(loss.item())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    noise = torch.ones((1, *context.family.latent_shape(24, 24)))
    text = {"style": torch.zeros(2, WIDTH)}
    drawn = draw_latents(lambda noisy, t: method.predict(noisy, t, text), context.family.objective, noise, 3, 1.0)
    assert drawn.shape == noise.shape
    assert not torch.equal(drawn, noise)
    with method.trained() as trained:
        assert isinstance(trained, TrainedPipeline)
        values = {name: value.read() for name, value in trained.tensors("transformer").items()}
        assert values.keys() == {name.removeprefix("transformer.") for name in method.parameters()}
        with pytest.raises(ConfigError, match="it cannot be a single file; write format: diffusers"):
            write_format(trained, OutputSpec(format=OutputFormat.SINGLE_FILE, to="."), tmp_path, About("tiny"))


def test_controlnet_on_a_family_without_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.method: ControlNet is not supported on this base"):
        ControlNet(make_context("ControlNet"))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_latent_shape_of_a_family_equals_the_output_of_its_vae(bases: dict[str, Path], name: str) -> None:
    family = open_base(tiny.make_spec(bases[name], bases[name]).model)
    mean, std = family.load_image_encoder(CPU).encode(torch.zeros(1, 3, 16, 24))
    assert mean.shape == std.shape
    assert tuple(family.scale_latents(mean[0]).shape) == family.latent_shape(24, 16)


def test_single_file_markers_are_distinct_with_one_default() -> None:
    markers = [family.single_file.marker for family in FAMILIES.values() if family.single_file is not None]
    assert markers.count(None) == 1
    assert len(set(markers)) == len(markers)
