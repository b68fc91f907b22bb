"""Looking at what is learnt: the loss on held-out samples, and pictures of the manifest's prompts.

Everything is drawn from the validation's own seed, so it is the same at every look, comparable from run to run, and
disturbs no draw of training. The ranks share the work.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from finetune_contract import paths
from finetune_contract.spec import ValidationSpec
from finetune_trainer.data.batches import SIZES, BatchMaker, Texts
from finetune_trainer.data.images.decoding import CENTRE, micro_conditioning
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef, micro_batches
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import StorageError
from finetune_trainer.files import write_aside
from finetune_trainer.methods.method import Method
from finetune_trainer.models.family import Family, ImageEncoder
from finetune_trainer.models.sampling import draw_latents
from finetune_trainer.train.metrics_logger import MetricsLogger
from finetune_trainer.train.pictures import build_grid, to_picture

_LOG = logging.getLogger(__name__)

NUM_TIMESTEPS = 4
"""Timesteps that each is looked at, one in each quarter of the schedule."""
_PICTURES = "pictures"


@dataclass(frozen=True)
class Validator:
    """Validates one run.

    Attributes:
        text: embeddings of the prompts.
        batches: makes the training batches; pictures take their conditions from the same samples.
        held_out: makes the held-out batches, with the validation's own draws; None where no split was named.
        latent_size: height and width of a picture's latents.
        batch_size: samples in one forward pass.
        noted: called by rank 0 when the results of a look are written.
    """

    spec: ValidationSpec
    world: World
    method: Method
    family: Family
    text: Texts
    batches: BatchMaker
    held_out: BatchMaker | None
    latent_size: tuple[int, int]
    batch_size: int
    total_steps: int
    job_dir: Path
    say: Callable[[str], None]
    journal: MetricsLogger | None = None
    noted: Callable[[], None] = lambda: None

    def due(self, step: int) -> bool:
        """Whether the model is looked at after a step: the untrained one, the trained one, and those between."""
        return step in (0, self.total_steps) or (self.spec.steps is not None and step % self.spec.steps == 0)

    def is_noted(self, step: int) -> bool:
        """Whether an earlier attempt has noted all results of a step; every rank gets the same answer."""
        return self.world.share(self._is_noted(step))

    def look(self, step: int) -> None:
        """Look at the model as it is after a step, and note what is seen.

        Raises:
            StorageError: the results cannot be written.
        """
        self.method.set_training(False)
        try:
            if self.held_out is not None:
                self._note_loss(step, self._held_out_losses(self.held_out))
            if self.spec.prompts:
                self._note_pictures(step, self._draw())
            if self.world.is_first:
                self.noted()
        except OSError as error:
            raise StorageError(f"validation: cannot write: {error}") from error
        finally:
            self.method.set_training(True)

    def _is_noted(self, step: int) -> bool:
        folder = self.job_dir / paths.VALIDATION
        has_loss = self.held_out is None or any(entry["step"] == step for entry in read_losses(folder / paths.LOSSES))
        return has_loss and (not self.spec.prompts or (folder / _grid_name(step)).is_file())

    @torch.no_grad()
    def _held_out_losses(self, batches: BatchMaker) -> list[float]:
        """Mean over samples for each part of the schedule. Each is computed by one rank, so the sum adds zeros."""
        num_samples = len(batches.source)
        count = num_samples * NUM_TIMESTEPS
        losses = torch.zeros(count, dtype=torch.float64, device=self.world.device)
        mine = range(self.world.rank * count // self.world.size, (self.world.rank + 1) * count // self.world.size)
        # Samples of unequal shapes go into no common batch.
        for part in micro_batches(mine, 1 if batches.shapes.buckets else self.batch_size):
            refs = [SampleRef(index % NUM_TIMESTEPS, index // NUM_TIMESTEPS) for index in part]
            timesteps = [spread_timestep(ref, num_samples, self.family.schedule.num_timesteps) for ref in refs]
            losses[part.start : part.stop] = self.method.losses(batches.make(refs, timesteps)).double()
            self.say(f"held-out loss {part.stop - mine.start}/{len(mine)}")
        means: list[float] = self.world.sum(losses).view(num_samples, NUM_TIMESTEPS).mean(0).tolist()
        return means

    @torch.no_grad()
    def _draw(self) -> Tensor:
        """Pictures of all prompts, uint8 (prompts, 3, H, W), the same on every rank."""
        vae: ImageEncoder = self.family.load_image_encoder(self.world.device)
        prompts = self.spec.prompts
        drawn: dict[int, Tensor] = {}
        for number in range(self.world.rank, len(prompts), self.world.size):
            self.say(f"picture {number + 1}/{len(prompts)}")
            drawn[number] = self._draw_one(vae, number)
        factor = self.family.latent_shape[1]
        side = tuple(size * factor for size in self.latent_size)
        pixels = torch.zeros((len(prompts), 3, *side), dtype=torch.uint8, device=self.world.device)
        for number, picture in drawn.items():
            pixels[number] = picture
        return self.world.sum(pixels)

    def _draw_one(self, vae: ImageEncoder, number: int) -> Tensor:
        """The picture of one prompt, uint8 (3, H, W)."""
        device = self.world.device
        channels, factor, _ = self.family.latent_shape
        shape = (1, channels, *self.latent_size)
        noise = Draws(self.spec.seed).normal(Purpose.PICTURE, SampleRef(0, number), shape).to(device)
        resolution = self.latent_size[0] * factor
        square = (resolution, resolution)
        size = micro_conditioning(square, square, CENTRE)
        text = {**self.text.get(["", self.spec.prompts[number]]), SIZES: size.expand(2, -1)}
        text = {name: value.to(device) for name, value in text.items()}
        condition = self._condition(number)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.method.predict(noisy, timesteps, text, condition)

        spec = self.spec
        latents = draw_latents(predict, self.family.schedule, noise, spec.num_inference_steps, spec.guidance_scale)
        return ((vae.decode(latents)[0] + 1) * 127.5).round().to(torch.uint8)

    def _condition(self, number: int) -> Tensor | None:
        """What a picture is conditioned on, (2, 3, H, W): prompt i takes the condition of sample i."""
        batches = self.held_out or self.batches
        if batches.conditioning is None:
            return None
        # Pictures are squares, whatever the samples are.
        shapes = dataclasses.replace(batches.conditioning.shapes, buckets=False)
        plain = dataclasses.replace(batches.conditioning, dropout=0.0, shapes=shapes)
        ref = SampleRef(0, number % len(batches.source))
        # The image itself may be gone: of a stream only its posterior is kept.
        size = batches.latents.posterior(ref.index, CENTRE).size
        condition = plain.read(batches.source, ref, CENTRE, size, batches.draws)
        return condition.to(self.world.device).expand(2, -1, -1, -1)

    def _note_loss(self, step: int, by_timestep: list[float]) -> None:
        if not self.world.is_first:
            return
        loss = sum(by_timestep) / len(by_timestep)
        _LOG.info("held-out loss after step %d: %.5f", step, loss)
        path = self.job_dir / paths.VALIDATION / paths.LOSSES
        # What a killed attempt noted of later steps is not so yet.
        earlier = [entry for entry in read_losses(path) if entry["step"] < step]
        entry = {"step": step, "loss": loss, "byTimestep": by_timestep}
        write_aside(path, json.dumps([*earlier, entry], indent=1).encode())
        if self.journal is not None:
            parts = {f"held-out loss/quarter {number + 1}": value for number, value in enumerate(by_timestep)}
            self.journal.validation(step, {"held-out loss": loss, **parts}, None)

    def _note_pictures(self, step: int, pixels: Tensor) -> None:
        if not self.world.is_first:
            return
        folder = self.job_dir / paths.VALIDATION
        pictures = [to_picture(each) for each in pixels]
        for number, picture in enumerate(pictures):
            _save_png(picture, folder / _PICTURES / f"step-{step:08d}-{number:02d}.png")
        rows = [(f"step {step}", pictures)]
        _save_png(build_grid(rows, self.spec.prompts), folder / _grid_name(step))
        before = [folder / _PICTURES / f"step-{0:08d}-{number:02d}.png" for number in range(len(pictures))]
        if step > 0 and all(path.is_file() for path in before):
            rows = [
                ("before", [Image.open(path).convert("RGB") for path in before]),
                (f"after\n{step} steps", pictures),
            ]
            _save_png(build_grid(rows, self.spec.prompts), folder / paths.GRID)
        if self.journal is not None:
            self.journal.validation(step, {}, folder / _grid_name(step))


def _grid_name(step: int) -> str:
    return f"step-{step:08d}.png"


def spread_timestep(ref: SampleRef, num_samples: int, num_timesteps: int) -> int:
    """Timestep of a held-out look: the looks of all samples together cover the schedule evenly.

    Args:
        ref: number of the look (as epoch), and sample.
        num_samples: held-out samples.
        num_timesteps: timesteps of the schedule.
    """
    place = ref.epoch + (ref.index + 0.5) / num_samples
    return int(place / NUM_TIMESTEPS * num_timesteps)


def read_losses(path: Path) -> list[dict[str, Any]]:
    """The held-out losses noted so far, by step; none where there is no such file."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return []


def best_validation(path: Path) -> dict[str, Any] | None:
    """The lowest held-out loss noted so far, {"step", "loss"}; None where none was."""
    return min(read_losses(path), key=lambda entry: float(entry["loss"]), default=None)


def _save_png(picture: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    write_aside(path, buffer.getvalue())
