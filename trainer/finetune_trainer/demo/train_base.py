"""Trains the base model of the demo from scratch and saves it as a diffusers folder in half precision.

On one thread, for a model like the one in `examples/base-circles`::

    python -m finetune_trainer.demo.train_base --out examples/base-circles
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from finetune_trainer.demo.architecture import NUM_TOKENS, build_scheduler, build_text_encoder, build_unet
from finetune_trainer.demo.base_unet import train_unet
from finetune_trainer.demo.base_vae import train_vae
from finetune_trainer.demo.circles import all_captions
from finetune_trainer.demo.picture_metrics import look_at, picture_grid, sample_images
from finetune_trainer.demo.vocabulary import write_tokenizer

_LOG = logging.getLogger(__name__)

_MAX_BYTES = 8_000_000
_ROUND = 0.85


def train_base(
    *, vae_steps: int, unet_steps: int, seed: int, vae: AutoencoderKL | None = None
) -> StableDiffusionPipeline:
    """Train every part of the base, or all but a `vae` that is given; the pipeline is in fp32."""
    vae = vae or train_vae(vae_steps, seed)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(Path(folder), NUM_TOKENS)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    train_unet(pipeline, unet_steps, seed)
    return pipeline


def save_base(pipeline: StableDiffusionPipeline, folder: Path) -> int:
    """Save the pipeline in half precision, whole or not at all, and return its size in bytes.

    Files beside the model's own, such as a README, stay. Raises ValueError when the model is over 8 MB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        part = Path(aside)
        pipeline.to(torch.float16).save_pretrained(part, safe_serialization=True)
        write_tokenizer(part / "tokenizer", NUM_TOKENS)
        _forget_origin(part)
        num_bytes = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        if num_bytes > _MAX_BYTES:
            raise ValueError(f"the model takes {num_bytes} bytes; make its parts smaller than {_MAX_BYTES} in all")
        for child in part.iterdir():
            target = folder / child.name
            if target.is_dir():
                shutil.rmtree(target)
            child.replace(target)
    return num_bytes


def _forget_origin(folder: Path) -> None:
    """Take out of the configurations where on this machine the parts were loaded from."""
    for path in [folder / "model_index.json", *folder.glob("*/config.json")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def score_base(folder: Path, grid: Path | None = None) -> dict[str, float]:
    """Draw every caption once with the saved model; the shares of right colours and of clean circles.

    The pictures are written to `grid` where one is named, a row for each colour of the circle.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)
    captions = all_captions()
    images = sample_images(pipeline, captions)
    if grid is not None:
        picture_grid([images[start : start + 9] for start in range(0, len(images), 9)]).save(grid)
    looks = [look_at(image) for image in images]
    right = [look.caption == wanted for look, wanted in zip(looks, captions, strict=True)]
    return {
        "right_colours": sum(right) / len(right),
        "round_circles": sum(look.roundness >= _ROUND for look in looks) / len(looks),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the demo's base model, save it, and print as the last line, in JSON, how good it is."""
    parser = argparse.ArgumentParser(prog="python -m finetune_trainer.demo.train_base", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to save the model to")
    parser.add_argument("--grid", type=Path, help="PNG file for one picture of every caption")
    parser.add_argument("--vae", type=Path, help="folder of a model whose VAE is kept and not trained again")
    parser.add_argument("--vae-steps", type=int, default=9000, help="training steps of the VAE (default: 9000)")
    parser.add_argument("--unet-steps", type=int, default=6000, help="training steps of the UNet (default: 6000)")
    parser.add_argument("--num-threads", type=int, default=1, help="threads to train with (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and the draws (default: 0)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.num_threads)
    vae = options.vae and AutoencoderKL.from_pretrained(options.vae, subfolder="vae").to(torch.float32)
    pipeline = train_base(vae_steps=options.vae_steps, unet_steps=options.unet_steps, seed=options.seed, vae=vae)
    num_bytes = save_base(pipeline, options.out)
    _LOG.info("saved %s, %.1f MB", options.out, num_bytes / 1e6)
    sys.stdout.write(json.dumps({"bytes": num_bytes, **score_base(options.out, options.grid)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
