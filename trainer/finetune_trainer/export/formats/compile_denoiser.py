"""Compiles the UNet of a pipeline folder to an AOTInductor package, in a process of its own.

Usage: python -m finetune_trainer.export.formats.compile_denoiser FOLDER WIDTH HEIGHT PRECISION

A process of its own starts without the settings and patches of a training, and returns all memory of the compiler.
The package is for the GPU if torch finds one, otherwise for the CPU. Its speed is measured beside that of eager mode.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.export.formats.load_compiled import DTYPES, FACTS, PACKAGE, describe_machine

MAX_BATCH = 16
"""Most inputs of a call; a picture with guidance needs two."""
_ADDED = ("text_embeds", "time_ids")
"""Conditions of SDXL in addition to the hidden states."""
_WARM_UP, _REPEATS, _MEASURE_SECONDS = 2, 10, 20.0
_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1, "fp16": 3e-2}
"""Largest accepted difference from eager mode, relative to the largest value."""


@dataclass(frozen=True)
class CompiledFacts:
    """What is known about a package. The names are those in the file.

    Attributes:
        device: cpu or cuda.
        machine: what the machine that runs it must have.
        precision: number format of weights and inputs.
        width: width of the pictures in pixels.
        height: their height.
        pixelsPerLatent: pixels per latent along each side.
        maxBatch: most inputs of a call.
        conditions: names of the conditions in addition to the hidden states.
        eagerSeconds: median time of a call with two inputs in eager mode.
        compiledSeconds: that of the package.
        speedUp: their ratio.
        maxDifference: largest difference from eager mode, relative to the largest value.
        isAccurate: whether the difference is that of the rounding.
    """

    device: str
    machine: str
    precision: str
    width: int
    height: int
    pixelsPerLatent: int  # noqa: N815  the name in the file
    maxBatch: int  # noqa: N815
    conditions: list[str]
    eagerSeconds: float  # noqa: N815
    compiledSeconds: float  # noqa: N815
    speedUp: float  # noqa: N815
    maxDifference: float  # noqa: N815
    isAccurate: bool  # noqa: N815


class Positional(nn.Module):
    """A UNet with positional arguments, as a package has them."""

    def __init__(self, unet: Any, conditions: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self._conditions = tuple(conditions)

    def forward(self, sample: Tensor, timestep: Tensor, hidden: Tensor, *added: Tensor) -> Tensor:
        """Return the prediction for latents (n, C, h, w), timesteps (n,) and hidden states (n, tokens, width)."""
        named = dict(zip(self._conditions, added, strict=True))
        result: Tensor = self.unet(
            sample, timestep, hidden, added_cond_kwargs=named if named else None, return_dict=False
        )[0]
        return result


def compile_denoiser(folder: Path, width: int, height: int, precision: str) -> CompiledFacts:
    """Write the package next to the configuration of the UNet, and what is known about it."""
    from diffusers import UNet2DConditionModel  # noqa: PLC0415  slow to import

    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=DTYPES[precision], use_safetensors=True)
    unet = unet.to(device).eval().requires_grad_(False)
    conditions = list(_ADDED) if unet.config.addition_embed_type == "text_time" else []
    module = Positional(unet, conditions).eval()
    scale = 2 ** (len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]) - 1)
    inputs = example_inputs(unet, folder, (height // scale, width // scale), device)
    package = folder / "unet" / PACKAGE
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
        dynamic: tuple[Any, ...] = ({0: batch},) * 3
        if conditions:
            dynamic += (({0: batch},) * len(conditions),)
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        compiled = torch._inductor.aoti_load_package(str(package))
        eager_seconds, compiled_seconds = measure([lambda: module(*inputs), lambda: compiled(*inputs)], device)
        difference = relative_difference(compiled(*inputs), module(*inputs))
    facts = CompiledFacts(
        device=device,
        machine=describe_machine(device),
        precision=precision,
        width=width,
        height=height,
        pixelsPerLatent=scale,
        maxBatch=MAX_BATCH,
        conditions=conditions,
        eagerSeconds=eager_seconds,
        compiledSeconds=compiled_seconds,
        speedUp=round(eager_seconds / compiled_seconds, 2),
        maxDifference=difference,
        isAccurate=difference <= _TOLERANCE[precision],
    )
    (folder / FACTS).write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")
    return facts


def example_inputs(unet: Any, folder: Path, size: tuple[int, int], device: str) -> tuple[Tensor, ...]:
    """Return random inputs for two pictures, in the shapes of the package.

    Timesteps are fp32, because some schedulers have fractional ones.
    """
    generator = torch.Generator().manual_seed(0)
    config, dtype = unet.config, unet.dtype
    text = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    text = text.get("text_config", text) if "max_position_embeddings" not in text else text

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator).to(device, dtype)

    hidden = normal(int(text["max_position_embeddings"]), int(config.cross_attention_dim))
    inputs = [normal(int(config.in_channels), *size), torch.full((2,), 500.0, device=device), hidden]
    if config.addition_embed_type == "text_time":
        pooled = int(config.projection_class_embeddings_input_dim) - 6 * int(config.addition_time_embed_dim)
        inputs += [normal(pooled), torch.full((2, 6), 512.0).to(device, dtype)]
    return tuple(inputs)


def measure(calls: Sequence[Callable[[], object]], device: str) -> list[float]:
    """Return the median seconds of each call. The calls alternate, so that a busy machine slows down all of them."""
    synchronize: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + _MEASURE_SECONDS
    for number in range(_WARM_UP + _REPEATS):
        for call, of_call in zip(calls, seconds, strict=True):
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            if number >= _WARM_UP or time.perf_counter() > end:
                of_call.append(time.perf_counter() - started)
        if time.perf_counter() > end and all(seconds):
            break
    return [statistics.median(of_call) for of_call in seconds]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-12))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile as the command line says."""
    folder, width, height, precision = sys.argv[1:] if arguments is None else arguments
    compile_denoiser(Path(folder), int(width), int(height), precision)


if __name__ == "__main__":
    main()
