"""Trains the base model of the demo from scratch and saves it as a diffusers folder in half precision.

To train a model like the one in `examples/base-circles`, on one thread::

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
from finetune_trainer.demo.picture_metrics import measure_picture, picture_grid, sample_images
from finetune_trainer.demo.vocabulary import write_tokenizer
from finetune_trainer.files import use_default_mode
from finetune_trainer.models.parts import remove_source_path
from finetune_trainer.models.text_names import make_text_names_portable

_LOG = logging.getLogger(__name__)

_MAX_BYTES = 8_000_000
_ROUND = 0.85


def train_base(
    *, vae_steps: int, unet_steps: int, seed: int, vae: AutoencoderKL | None = None
) -> StableDiffusionPipeline:
    """Train all parts of the base model, except for a given `vae`. Return the pipeline in fp32."""
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
    """Save the pipeline in half precision, and return its size in bytes.

    The model replaces an existing one only after it is complete. Other files in the folder, such as a README, stay.
    Raise ValueError if the model is larger than 8 MB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        part = Path(temporary)
        pipeline.to(torch.float16).save_pretrained(part, safe_serialization=True)
        use_default_mode([path for path in part.rglob("*") if path.is_file()], part)
        write_tokenizer(part / "tokenizer", NUM_TOKENS)
        make_text_names_portable(part / "text_encoder")
        for path in [part / "model_index.json", *part.glob("*/config.json")]:
            remove_source_path(path)
        num_bytes = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        if num_bytes > _MAX_BYTES:
            raise ValueError(
                f"the model has {num_bytes} bytes; reduce its parts to less than {_MAX_BYTES} bytes in total"
            )
        for child in part.iterdir():
            target = folder / child.name
            if target.is_dir():
                shutil.rmtree(target)
            child.replace(target)
    return num_bytes


def score_base(folder: Path, grid: Path | None = None) -> dict[str, float]:
    """Generate one picture for each caption with the saved model.

    Return the fractions of pictures with the right colours and with a round circle. If `grid` is given, write the
    pictures to this file, with one row for each colour of the circle.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)
    captions = all_captions()
    images = sample_images(pipeline, captions)
    if grid is not None:
        picture_grid([images[start : start + 9] for start in range(0, len(images), 9)]).save(grid)
    metrics = [measure_picture(image) for image in images]
    right = [each.caption == caption for each, caption in zip(metrics, captions, strict=True)]
    return {
        "right_colours": sum(right) / len(right),
        "round_circles": sum(each.roundness >= _ROUND for each in metrics) / len(metrics),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the demo's base model and save it. The last line of the output is its quality in JSON."""
    parser = argparse.ArgumentParser(prog="python -m finetune_trainer.demo.train_base", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to save the model to")
    parser.add_argument("--grid", type=Path, help="PNG file to write, with one picture for each caption")
    parser.add_argument("--vae", type=Path, help="folder of a model whose VAE is reused instead of trained")
    parser.add_argument("--vae-steps", type=int, default=9000, help="training steps of the VAE (default: 9000)")
    parser.add_argument("--unet-steps", type=int, default=6000, help="training steps of the UNet (default: 6000)")
    parser.add_argument("--num-threads", type=int, default=1, help="threads to train with (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of all random draws (default: 0)")
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
