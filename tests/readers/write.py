"""Trains every method on every family for a few steps and writes every format: what the readers read.

Usage: python -m tests.readers.write FOLDER
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune_contract.exit_codes import ExitCode
from finetune_contract.methods import METHODS
from finetune_contract.outputs.environments import EXPORT_FORMATS
from finetune_contract.outputs.spec import OutputFormat
from finetune_contract.spec import Method
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.report import Reporter
from finetune_trainer.train.context import RankContext
from finetune_trainer.train.preemption_notice import PreemptionNotice
from finetune_trainer.train.run import run_rank
from testing.trainer import tiny
from testing.trainer.methods import SETTINGS
from testing.trainer.single_file import to_open_clip, to_original
from tests.readers.cases import GUIDANCE_SCALE, NUM_STEPS, RESOLUTION, Case, write_cases

STEPS = 3
PROMPT = "word"
MIN_CHANGE = 16
"""Smallest accepted change of a picture by the training, of 255: eight times the tolerance of the readers."""
MORE: dict[str, dict[str, Any]] = {
    "LoRA, text and alpha": {"method": "LoRA", "lora": {"rank": 2, "alpha": 5, "trainTextEncoder": True}},
    "LoRA, more modules": {
        "method": "LoRA",
        "lora": {
            "rank": 2,
            "alpha": 1,
            "useDora": True,
            "targetModules": ["to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj"],
        },
    },
}
"""Settings in addition to those that all tests of the methods use."""
OTHER_FORMATS = EXPORT_FORMATS | {OutputFormat.COMPILED}
"""Formats that only their own programs read, on the machine or with the releases that wrote them."""
ONE_FILE = (OutputFormat.SINGLE_FILE, OutputFormat.WEBUI, OutputFormat.COMFYUI)
KINDS = {
    **{
        (method, output): "lora" if output is OutputFormat.DIFFUSERS else "kohya"
        for method in (Method.LORA, Method.DREAMBOOTH_LORA)
        for output in (OutputFormat.DIFFUSERS, OutputFormat.KOHYA, OutputFormat.WEBUI, OutputFormat.COMFYUI)
    },
    (Method.TEXTUAL_INVERSION, OutputFormat.DIFFUSERS): "embedding",
    **{(Method.TEXTUAL_INVERSION, output): "webui embedding" for output in ONE_FILE},
    **{(Method.CONTROLNET, output): "controlnet file" for output in ONE_FILE},
    **{(method, output): "single file" for method in (Method.FULL, Method.DREAMBOOTH) for output in ONE_FILE},
    **{(method, OutputFormat.MERGED): "pipeline" for method in (Method.LORA, Method.DREAMBOOTH_LORA)},
    (Method.CONTROLNET, OutputFormat.DIFFUSERS): "controlnet",
    (Method.FULL, OutputFormat.DIFFUSERS): "pipeline",
    (Method.DREAMBOOTH, OutputFormat.DIFFUSERS): "pipeline",
}
"""Kind of each output. tests/export reads the formats of the export environment."""
FULL_CONTROLNET = "controlnet pipeline"
"""Kind of a ControlNet that is written with its base."""


@dataclass(frozen=True)
class TinyBase:
    """A tiny base as a folder and as a single file with the names of the original code."""

    family: str
    folder: Path
    original: Path


def main(folder: Path) -> None:
    """Write the bases, the outputs and the list of cases."""
    shutil.rmtree(folder, ignore_errors=True)
    data = _write_data(folder / "data")
    cases: list[Case] = []
    started = time.monotonic()
    for family in tiny.FAMILIES:
        # diffusers tells the two text encoders of a single file apart by their widths.
        written = tiny.write_base(folder / "bases" / family, family=family, second_width=2 * tiny.WIDTH)
        base = TinyBase(family, _listening(written), _write_original(written, family))
        for name, settings in (SETTINGS | MORE).items():
            cases += train(settings, base, data, folder / "jobs" / f"{family}, {name}")
    write_cases(folder, cases)
    print(f"{len(cases)} outputs written in {time.monotonic() - started:.0f} s", flush=True)


def _write_data(folder: Path) -> Path:
    """Write images whose captions contain the new token: neutral templates are longer than the tiny encoder reads."""
    tiny.write_data(folder)
    for path in folder.glob("*/metadata.jsonl"):
        path.write_text(path.read_text(encoding="utf-8").replace("picture ", "<cat> "), encoding="utf-8")
    return folder


def _listening(base: Path) -> Path:
    """Enlarge the cross-attention of a base: with random weights, captions hardly change its pictures."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    for name, module in unet.named_modules():
        if ".attn2.to_" in name and isinstance(module, nn.Linear):
            module.weight.data *= 4
    unet.save_pretrained(base / "unet")
    return base


def _write_original(base: Path, family: str) -> Path:
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    file = base.with_name(f"{family}.safetensors")
    pipeline = kind.from_pretrained(base)
    tensors = to_original(pipeline)
    if family == "sd2":
        # Stable Diffusion 2 was trained with open_clip.
        tensors = {name: value for name, value in tensors.items() if not name.startswith("cond_stage_model.")}
        state = pipeline.text_encoder.state_dict()
        # Newer releases of transformers leave the prefix out.
        text = to_open_clip({f"text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()})
        tensors |= {f"cond_stage_model.model.{name}": value.contiguous() for name, value in text.items()}
    save_file(tensors, file)
    return file


def train(settings: dict[str, Any], base: TinyBase, data: Path, job: Path) -> Iterator[Case]:
    """Train one method on one base and write all its formats, into the folder `job`. Yield a case for each."""
    method = Method(settings["method"])
    formats = sorted(METHODS[method].formats - OTHER_FORMATS)
    token = settings.get("textualInversion", {}).get("placeholderToken", "")
    prompt = f"{PROMPT} {token}".strip()
    validation = {"prompts": [prompt], "numInferenceSteps": NUM_STEPS, "guidanceScale": GUIDANCE_SCALE}
    spec = tiny.make_spec(base.folder, data, **settings, steps=STEPS, learningRate=0.03, validation=validation)
    targets: dict[str, tuple[str, dict[str, Any]]] = {
        each.value: (KINDS[method, each], {"format": each.value}) for each in formats
    }
    if method is Method.CONTROLNET:
        targets["full"] = (FULL_CONTROLNET, {"format": "diffusers", "full": True})
    outputs = [{**output, "to": name} for name, (_, output) in targets.items()]
    spec = spec.model_validate({**spec.model_dump(mode="json", by_alias=True), "outputs": outputs})
    context = RankContext(spec, 1, job, job.parent / "cache", PreemptionNotice(), Reporter(0, None))
    assert run_rank(context, {"OMP_NUM_THREADS": "1"}) is ExitCode.DONE
    pictures = [job / "validation/pictures" / f"step-{step:08d}-00.png" for step in (0, STEPS)]
    before, after = (_pixels(path) for path in pictures)
    change = int((before - after).abs().max())
    assert change >= MIN_CHANGE, f"{job.name}: training changed the picture by {change} of 255; no reader could fail"
    noise = job / "noise.safetensors"
    shape = (1, 4, RESOLUTION // 2, RESOLUTION // 2)
    save_file({"noise": Draws(0).normal(Purpose.PICTURE, SampleRef(0, 0), shape)}, noise)
    for target, (kind, _) in targets.items():
        yield Case(
            name=f"{job.name}, {target}",
            family=base.family,
            kind=kind,
            base=str(base.folder),
            original=str(base.original),
            output=str(job / "outputs" / target),
            prompt=prompt,
            token=token,
            picture=str(pictures[1]),
            noise=str(noise),
            condition=str(data / "train/edges-0.png"),
        )


def _pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.int16)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main(Path(sys.argv[1]).absolute())
