"""The two references of `bench.train`: the floor, and a plain loop as in the usual training scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn

from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.data.batches import Batch
from finetune_trainer.distributed.gradients import Gradients
from finetune_trainer.methods.method import Method
from testing.measure.architectures import RandomFamily
from testing.measure.device import measured_device

_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


class Floor:
    """Forward pass, backward pass and a step of a fused optimizer over the trained parameters, on a prepared batch.

    Weights and moments are shared with the product's loop; the two are measured alternately.
    """

    def __init__(self, method: Method, batch: Batch, state: TrainState, gradients: Gradients) -> None:
        assert state.optimizer.param_groups[0]["fused"]
        self._method = method
        self._batch = batch
        self._state = state
        self._gradients = gradients

    def step(self) -> None:
        """Run one step."""
        self._method.losses(self._batch).mean().backward()  # type: ignore[no-untyped-call]
        self._state.optimizer.step()
        self._state.refresh()
        self._gradients.clear()


class PlainLoop:
    """A plain loop: each step encodes image and text and reads the loss; unfused AdamW; no channels last.

    Attributes:
        unet: the base's UNet.
        controlnet: the ControlNet, if one is trained.
        optimizer: AdamW over the trained weights.
    """

    def __init__(self, family: RandomFamily, method: str, images: Sequence[Path], resolution: int, batch: int) -> None:
        self._family = family
        self._method = method
        self._images = list(images)
        self._resolution = resolution
        self._batch = batch
        self._device = measured_device()
        self._steps = 0
        self._dtype = torch.bfloat16
        self._objective = family.objective.to(self._device)
        trains_table = method == "TextualInversion"
        # SDXL's VAE can return NaN in half precision. Its scripts use fp32, except for textual inversion.
        self._vae_dtype = torch.float32 if family.name == "sdxl" and not trains_table else self._dtype
        self._vae = family.load_vae(self._vae_dtype).to(self._device).requires_grad_(False)
        self._text = family.load_text_encoder(self._device, torch.float32 if trains_table else self._dtype)
        trains_unet = method in ("Full", "DreamBooth")
        unet = family.load_denoiser(torch.float32 if trains_unet else self._dtype)
        self.unet: Any = unet.to(self._device).requires_grad_(trains_unet).train()
        self.controlnet: Any = None
        self._parameters = self._trained()
        self.optimizer: Any = torch.optim.AdamW(self._parameters, lr=1e-6)
        self._table: Tensor | None = None
        if trains_table:
            self._table = self._parameters[0].detach().clone()

    def _trained(self) -> list[nn.Parameter]:
        if self._method == "TextualInversion":
            tables = [part.core.embeddings.token_embedding.weight for part in self._text.parts]
            return [table.requires_grad_(True) for table in tables]
        if self._method == "ControlNet":
            self.controlnet = ControlNetModel.from_unet(self.unet).float().to(self._device).train()
            return list(self.controlnet.parameters())
        if "LoRA" in self._method:
            self.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=_TARGETS))
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    def step(self) -> None:
        """Run one step."""
        first = self._steps * self._batch
        self._steps += 1
        paths = [self._images[index % len(self._images)] for index in range(first, first + self._batch)]
        pixels = torch.cat([self._pixels(path) for path in paths]).to(self._device)
        with torch.no_grad():
            latents = self._vae.encode(pixels.to(self._vae_dtype)).latent_dist.sample()
            latents = self._family.scale_latents(latents)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (len(latents),), device=self._device)
        noisy = self._objective.add_noise(latents, noise, timesteps)
        with torch.autocast(self._device.type, self._dtype):
            text = self._encode([f"picture {path.stem}" for path in paths])
            loss = nn.functional.mse_loss(self._predict(noisy, timesteps, text, pixels).float(), noise.float())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._table is not None:
            # Restore all rows except the new one.
            with torch.no_grad():
                self._parameters[0][1:] = self._table[1:]
        loss.detach().item()

    def _pixels(self, path: Path) -> Tensor:
        image = Image.open(path).convert("RGB").resize((self._resolution, self._resolution))
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div(127.5).sub(1).unsqueeze(0)

    def _encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self._method == "TextualInversion"):
            text = self._text.encode(captions)
        side = self._resolution
        return {
            **text,
            "sizes": torch.tensor([[side, side, 0, 0, side, side]] * len(captions), device=self._device).float(),
        }

    def _predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], pixels: Tensor) -> Tensor:
        conditions = self._family.conditions(text, self._dtype)
        if self.controlnet is not None:
            down, middle = self.controlnet(
                noisy, timesteps, controlnet_cond=pixels.to(self._dtype), return_dict=False, **conditions
            )
            # As in the usual scripts: accelerate turns the outputs of a trained model into fp32.
            conditions |= {
                "down_block_additional_residuals": [each.to(self._dtype) for each in down],
                "mid_block_additional_residual": middle.to(self._dtype),
            }
        prediction: Tensor = self.unet(noisy, timesteps, return_dict=False, **conditions)[0]
        return prediction
