"""Settings of each method for the tiny bases: the table that the tests of all methods use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_contract.input_spec import ModelSpec
from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.batches import Batch
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.write import write_format
from finetune_trainer.methods.method import Method, MethodContext
from finetune_trainer.methods.registry import method_class
from finetune_trainer.models.base import open_base
from finetune_trainer.models.family import IMAGE_SIZES, Family
from finetune_trainer.models.layouts.trained import TrainedPipeline, part_of_module
from testing.trainer import tiny

CPU = torch.device("cpu")

SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "LoRA", "lora": {"rank": 2, "alpha": 6}},
    "LoRA, text": {"method": "LoRA", "lora": {"rank": 2, "trainTextEncoder": True, "useDora": True}},
    "Full": {"method": "Full"},
    "DreamBooth": {
        "method": "DreamBooth",
        "dreambooth": {"instancePrompt": "sks", "classPrompt": "dog", "numClassImages": 3, "priorLossWeight": 0.5},
    },
    "DreamBooth, text": {
        "method": "DreamBooth",
        "dreambooth": {"instancePrompt": "sks", "trainTextEncoder": True},
    },
    "DreamBoothLoRA": {
        "method": "DreamBoothLoRA",
        "lora": {"rank": 2},
        "dreambooth": {"instancePrompt": "sks", "classPrompt": "dog", "numClassImages": 3},
    },
    "TextualInversion": {
        "method": "TextualInversion",
        "textualInversion": {"placeholderToken": "<cat>", "initializerToken": "a", "numVectors": 2},
    },
    "ControlNet": {"method": "ControlNet"},
}


def make_method(base: Path, name: str, dtype: torch.dtype = torch.float32, **training: Any) -> Method:
    """Return a method on a tiny base, created as in a rank."""
    spec = TrainingSpec.model_validate({**SETTINGS[name], **training})
    context = MethodContext(open_base(ModelSpec(base=str(base))), spec, Draws(0), CPU, dtype)
    return method_class(spec.method)(context)


def export(method: Method, output: str | OutputSpec, folder: Path) -> list[Path]:
    """Write what a method trained into a folder, without delivery, as the job `tiny`."""
    spec = OutputSpec(format=OutputFormat(output), to=".") if isinstance(output, str) else output
    with method.trained() as trained:
        return write_format(trained, spec, folder, About("tiny"))


def write_pipeline(family: Family, folder: Path, trained: Mapping[str, Any] | None = None) -> list[Path]:
    """Write a pipeline with trained modules in diffusers' layout."""
    parts = {name: part_of_module(module) for name, module in (trained or {}).items()}
    return write_format(
        TrainedPipeline(family, parts), OutputSpec(format=OutputFormat.DIFFUSERS, to="."), folder, About("tiny")
    )


def make_batch(family: str, seed: int = 0, count: int = 3, caption: str = "") -> Batch:
    """Return a batch of random numbers in the family's shapes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents, noise = normal(2, count, 4, 8, 8)
    timesteps = torch.randint(1000, (count,), generator=generator)
    width = 2 * tiny.WIDTH if family == "sdxl" else tiny.WIDTH
    text = {
        "hidden": normal(count, tiny.NUM_TOKENS, width),
        "pooled": normal(count, tiny.WIDTH),
        IMAGE_SIZES: torch.tensor([[20, 24, 0, number, 16, 16] for number in range(count)], dtype=torch.float32),
    }
    captions = tuple(caption or f"word {number}" for number in range(count))
    conditioning = torch.rand((count, 3, 16, 16), generator=generator)
    return Batch(latents, noise, timesteps, captions, text, conditioning=conditioning)
