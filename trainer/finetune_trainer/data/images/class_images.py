"""Class images for prior preservation (https://arxiv.org/abs/2208.12242, section 3.2): drawn once with the base model.

Picture number i follows from the base, the prompt and i alone. So an interrupted drawing goes on with what is missing,
the ranks share the work, and other jobs with the same class find the pictures there.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from finetune_trainer.data.cache.hashes import FileHashes, hash_text
from finetune_trainer.data.images.decoding import CENTRE, micro_conditioning
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.data.sources.folder import FolderSource, Row
from finetune_trainer.distributed.world import World
from finetune_trainer.files import write_aside
from finetune_trainer.models.family import Family
from finetune_trainer.models.sampling import draw_latents

NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 7.5
_SEED = 0


@dataclass(frozen=True)
class ClassImages:
    """Draws the class images of one prompt; all ranks take part.

    Attributes:
        family: the base model.
        prompt: what to draw.
        count: how many.
        resolution: side of a picture.
        dtype: number format of the UNet while drawing.
        root: the cache that all jobs share.
        say: told how many of how many this rank has drawn.
    """

    family: Family
    prompt: str
    count: int
    resolution: int
    dtype: torch.dtype
    root: Path
    world: World
    say: Callable[[int, int], None]

    def open(self, hashes: FileHashes) -> FolderSource:
        """Draw what is missing, and return all of them."""
        folder = self._folder(hashes)
        names = [f"{number:06d}.png" for number in range(self.count)]
        # One list for all: what a rank finds missing depends on what the others have drawn by then.
        missing = self.world.share([number for number, name in enumerate(names) if not (folder / name).is_file()])
        self._draw(folder, missing[self.world.rank :: self.world.size])
        self.world.barrier()
        # Where the ranks share no disk, each draws for itself what the others have drawn for themselves.
        self._draw(folder, [number for number in missing if not (folder / names[number]).is_file()])
        return FolderSource(folder, [Row(name) for name in names])

    def _folder(self, hashes: FileHashes) -> Path:
        family = self.family
        files = [*family.unet_files(), *family.text_encoder_files(), *family.image_encoder_files()]
        about = hash_text(
            "class images", hashes.of_files(files), self.prompt, str(self.resolution), str(self.dtype),
            f"{NUM_INFERENCE_STEPS} {GUIDANCE_SCALE} {_SEED}",
        )  # fmt: skip
        return self.root / "class-images" / about[:32]

    @torch.no_grad()
    def _draw(self, folder: Path, numbers: list[int]) -> None:
        if not numbers:
            return
        family, device = self.family, self.world.device
        unet = family.load_unet(self.dtype).eval().to(device)
        vae = family.load_image_encoder(device)
        text = family.load_text_encoder(device).encode(["", self.prompt])
        square = (self.resolution, self.resolution)
        size = micro_conditioning(square, square, CENTRE)
        conditions = family.conditions({**text, "sizes": size.expand(2, -1).to(device)}, self.dtype)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            answer: Tensor = unet(noisy.to(self.dtype), timesteps, **conditions, return_dict=False)[0]
            return answer

        channels, height, width = family.latent_shape
        shape = (1, channels, self.resolution // height, self.resolution // width)
        for done, number in enumerate(numbers, start=1):
            noise = Draws(_SEED).normal(Purpose.PICTURE, SampleRef(0, number), shape).to(device)
            latents = draw_latents(predict, family.schedule, noise, NUM_INFERENCE_STEPS, GUIDANCE_SCALE)
            _save(vae.decode(latents)[0], folder / f"{number:06d}.png")
            self.say(done, len(numbers))


def _save(pixels: Tensor, path: Path) -> None:
    array = ((pixels.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    write_aside(path, buffer.getvalue())
