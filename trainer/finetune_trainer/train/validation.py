"""Validation: the loss on held-out samples, and pictures of the manifest's prompts.

All random draws use the validation's own seed. So they are the same in every validation, results of different runs are
comparable, and no draw of training changes. The ranks share the work.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from finetune_contract import paths
from finetune_contract.validation_spec import ValidationSpec
from finetune_trainer.data.batches import BatchMaker, Texts
from finetune_trainer.data.images.decoding import CENTRE, micro_conditioning
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef, ends_epochs, micro_batches
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import StorageError
from finetune_trainer.files import write_atomically
from finetune_trainer.methods.method import Method
from finetune_trainer.models.family import IMAGE_SIZES, Family, ImageEncoder
from finetune_trainer.models.sampling import draw_latents
from finetune_trainer.train.metrics_logger import MetricsLogger
from finetune_trainer.train.pictures import build_grid, to_picture

_LOG = logging.getLogger(__name__)

NUM_TIMESTEPS = 4
"""Number of timesteps for each held-out sample, one in each quarter of the schedule."""
_PICTURES = "pictures"


@dataclass(frozen=True)
class Validator:
    """Validates one run.

    Attributes:
        spec: the validation settings.
        text: embeddings of the prompts.
        batches: makes the training batches; pictures use the conditioning images of these samples.
        held_out: makes the held-out batches, with the validation's own draws; None if no split is named.
        resolution: side of the square pictures in pixels, a multiple of the pixels per latent.
        batch_size: number of samples in one forward pass.
        total_steps: number of steps of the run.
        epoch: number of samples in an epoch, and in a step.
        conditions: conditioning images of the prompts, each float32 (3, H, W) in [0, 1]; empty for those of samples.
        job_dir: the job's folder.
        on_progress: receives progress messages.
        first_step: step at which the run began: 0, or that of another job's checkpoint.
        metrics: logs the results to the trackers; None if there are none.
        on_results: called by rank 0 when the results of a validation are written.
    """

    spec: ValidationSpec
    world: World
    method: Method
    family: Family
    text: Texts
    batches: BatchMaker
    held_out: BatchMaker | None
    resolution: int
    batch_size: int
    total_steps: int
    epoch: tuple[int, int]
    conditions: Sequence[Tensor]
    job_dir: Path
    on_progress: Callable[[str], None]
    first_step: int = 0
    metrics: MetricsLogger | None = None
    on_results: Callable[[], None] = lambda: None

    def due(self, step: int) -> bool:
        """Return whether to validate after a step: at the start, at the end, and in the manifest's interval."""
        if step in (self.first_step, self.total_steps):
            return True
        if self.spec.epochs is not None:
            return ends_epochs(step, *self.epoch, self.spec.epochs)
        return self.spec.steps is not None and step % self.spec.steps == 0

    def is_recorded(self, step: int) -> bool:
        """Return whether an earlier attempt has recorded all results of a step; the same on every rank."""
        return self.world.share(self._is_recorded(step))

    def validate(self, step: int) -> None:
        """Validate the model after a step, and record the results. All ranks call it.

        Raises:
            StorageError: the results cannot be written.
        """
        self.method.set_training(False)
        try:
            if self.held_out is not None:
                self._record_loss(step, self._held_out_losses(self.held_out))
            if self.spec.prompts:
                self._record_pictures(step, self._draw())
            if self.world.is_first:
                self.on_results()
        except OSError as error:
            raise StorageError(f"validation: cannot write: {error}") from error
        finally:
            self.method.set_training(True)

    def _is_recorded(self, step: int) -> bool:
        folder = self.job_dir / paths.VALIDATION
        has_loss = self.held_out is None or any(entry["step"] == step for entry in read_losses(folder / paths.LOSSES))
        return has_loss and (not self.spec.prompts or (folder / _grid_name(step)).is_file())

    @torch.no_grad()
    def _held_out_losses(self, batches: BatchMaker) -> list[float]:
        """Return the mean over samples for each part of the schedule.

        One rank computes each loss, so the sum over ranks only adds zeros.
        """
        num_samples = len(batches.source)
        count = num_samples * NUM_TIMESTEPS
        losses = torch.zeros(count, dtype=torch.float64, device=self.world.device)
        mine = range(self.world.rank * count // self.world.size, (self.world.rank + 1) * count // self.world.size)
        # Samples with different shapes cannot share a batch.
        for part in micro_batches(mine, 1 if batches.shapes.buckets else self.batch_size):
            refs = [SampleRef(index % NUM_TIMESTEPS, index // NUM_TIMESTEPS) for index in part]
            timesteps = [spread_timestep(ref, num_samples, self.family.objective.num_timesteps) for ref in refs]
            losses[part.start : part.stop] = self.method.losses(batches.make(refs, timesteps)).double()
            self.on_progress(f"held-out loss {part.stop - mine.start}/{len(mine)}")
        means: list[float] = self.world.sum(losses).view(num_samples, NUM_TIMESTEPS).mean(0).tolist()
        return means

    @torch.no_grad()
    def _draw(self) -> Tensor:
        """Return pictures of all prompts, uint8 (prompts, 3, H, W), the same on every rank."""
        vae: ImageEncoder = self.family.load_image_encoder(self.world.device)
        prompts = self.spec.prompts
        drawn: dict[int, Tensor] = {}
        for number in range(self.world.rank, len(prompts), self.world.size):
            self.on_progress(f"picture {number + 1}/{len(prompts)}")
            drawn[number] = self._draw_one(vae, number)
        shape = (len(prompts), 3, self.resolution, self.resolution)
        pixels = torch.zeros(shape, dtype=torch.uint8, device=self.world.device)
        for number, picture in drawn.items():
            pixels[number] = picture
        return self.world.sum(pixels)

    def _draw_one(self, vae: ImageEncoder, number: int) -> Tensor:
        """Return the picture of one prompt, uint8 (3, H, W)."""
        device = self.world.device
        square = (self.resolution, self.resolution)
        shape = (1, *self.family.latent_shape(*square))
        noise = Draws(self.spec.seed).normal(Purpose.PICTURE, SampleRef(0, number), shape).to(device)
        size = micro_conditioning(square, square, CENTRE)
        text = {**self.text.get(["", self.spec.prompts[number]]), IMAGE_SIZES: size.expand(2, -1)}
        text = {name: value.to(device) for name, value in text.items()}
        condition = self._condition(number)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.method.predict(noisy, timesteps, text, condition)

        spec = self.spec
        latents = draw_latents(predict, self.family.objective, noise, spec.num_inference_steps, spec.guidance_scale)
        return ((vae.decode(latents)[0] + 1) * 127.5).round().to(torch.uint8)

    def _condition(self, number: int) -> Tensor | None:
        """Return the conditioning image of a picture, (2, 3, H, W): of the manifest, or for prompt i of sample i."""
        if self.conditions:
            return self.conditions[number].to(self.world.device).expand(2, -1, -1, -1)
        batches = self.held_out or self.batches
        if batches.conditioning is None:
            return None
        # Pictures are square, even if the samples are not.
        shapes = dataclasses.replace(batches.conditioning.shapes, buckets=False)
        plain = dataclasses.replace(batches.conditioning, dropout=0.0, shapes=shapes)
        ref = SampleRef(0, number % len(batches.source))
        # The image may be unavailable: for a stream, only the latent posterior is stored.
        size = batches.latents.posterior(ref.index, CENTRE).size
        condition = plain.read(batches.source, ref, CENTRE, size, batches.draws)
        return condition.to(self.world.device).expand(2, -1, -1, -1)

    def _record_loss(self, step: int, by_timestep: list[float]) -> None:
        if not self.world.is_first:
            return
        loss = sum(by_timestep) / len(by_timestep)
        _LOG.info("held-out loss after step %d: %.5f", step, loss)
        path = self.job_dir / paths.VALIDATION / paths.LOSSES
        # Drop later steps: a killed attempt recorded them, and this attempt has not reached them yet.
        earlier = [entry for entry in read_losses(path) if entry["step"] < step]
        entry = {"step": step, "loss": loss, "byTimestep": by_timestep}
        write_atomically(path, json.dumps([*earlier, entry], indent=1).encode())
        if self.metrics is not None:
            parts = {f"held-out loss/quarter {number + 1}": value for number, value in enumerate(by_timestep)}
            self.metrics.log_validation(step, {"held-out loss": loss, **parts}, None)

    def _record_pictures(self, step: int, pixels: Tensor) -> None:
        if not self.world.is_first:
            return
        folder = self.job_dir / paths.VALIDATION
        pictures = [to_picture(each) for each in pixels]
        for number, picture in enumerate(pictures):
            _save_png(picture, folder / _PICTURES / f"step-{step:08d}-{number:02d}.png")
        rows = [(f"step {step}", pictures)]
        _save_png(build_grid(rows, self.spec.prompts), folder / _grid_name(step))
        first = f"step-{self.first_step:08d}"
        before = [folder / _PICTURES / f"{first}-{number:02d}.png" for number in range(len(pictures))]
        if step > self.first_step and all(path.is_file() for path in before):
            rows = [
                ("before", [Image.open(path).convert("RGB") for path in before]),
                (f"after\n{step} steps", pictures),
            ]
            _save_png(build_grid(rows, self.spec.prompts), folder / paths.GRID)
        if self.metrics is not None:
            self.metrics.log_validation(step, {}, folder / _grid_name(step))


def _grid_name(step: int) -> str:
    return f"step-{step:08d}.png"


def spread_timestep(ref: SampleRef, num_samples: int, num_timesteps: int) -> int:
    """Return the timestep of a held-out loss. The timesteps of all samples together cover the schedule evenly.

    Args:
        ref: the quarter of the schedule (as epoch), and the sample.
        num_samples: number of held-out samples.
        num_timesteps: number of timesteps of the schedule.
    """
    quarters = ref.epoch + (ref.index + 0.5) / num_samples
    return int(quarters / NUM_TIMESTEPS * num_timesteps)


def read_losses(path: Path) -> list[dict[str, Any]]:
    """Return the recorded held-out losses, by step; an empty list if the file does not exist."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return []


def best_validation(path: Path) -> dict[str, Any] | None:
    """Return the lowest recorded held-out loss, {"step", "loss"}; None if there is none."""
    return min(read_losses(path), key=lambda entry: float(entry["loss"]), default=None)


def _save_png(picture: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    write_atomically(path, buffer.getvalue())
