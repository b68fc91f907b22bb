"""Reads outputs as a user of diffusers does, with the releases of the environment that runs it, and compares pictures.

It imports nothing of this project except its neighbours, so it runs in an environment without the project. Each output
must be read completely: no tensor is left over, none is missing, and the picture is that of the trainer.

Usage: python -m tests.readers.read FOLDER
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch
import transformers
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, convert_controlnet_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.readers.cases import GUIDANCE_SCALE, NUM_STEPS, RESOLUTION, Case, read_cases
from tests.readers.webui import merge_kohya

TOLERANCE = 2
"""Largest accepted difference of a picture from the trainer's, of 255."""
_SUBMODULES = ("unet", "vae", "text_encoder", "text_encoder_2")


def main(folder: Path) -> int:
    """Read all outputs, print a line for each problem, and return the exit code."""
    started, worst, problems = time.monotonic(), 0.0, 0
    cases = read_cases(folder)
    checks = [(Path(each).name, partial(check_original, each, base)) for each, base in _bases(cases)]
    for name, check in [*checks, *((case.name, partial(read, case)) for case in cases)]:
        try:
            worst = max(worst, check())
        except Exception as error:
            # Readers raise many kinds of errors; each is a problem of the output.
            problems += 1
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:500]}", flush=True)
    releases = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(
        f"{releases}: {len(cases)} outputs read in {time.monotonic() - started:.0f} s, {problems} with problems; "
        f"largest difference of a picture {worst:.2f} of 255",
        flush=True,
    )
    return 1 if problems or not cases else 0


def _bases(cases: Iterable[Case]) -> list[tuple[str, str]]:
    return sorted({(case.original, case.base) for case in cases})


def read(case: Case) -> float:
    """Read an output in each way that its kind has.

    Returns:
        The largest difference of the pictures from the trainer's, of 255.

    Raises:
        Exception: it cannot be read completely, or its picture differs.
    """
    return max(check_picture(case, reader(case)) for reader in READERS[case.kind])


def check_picture(case: Case, pipeline: Any) -> float:
    """Return the largest difference of the pipeline's picture from the trainer's, of 255.

    Raises:
        ValueError: it is more than the tolerance.
    """
    expected = np.asarray(Image.open(case.picture).convert("RGB"), dtype=np.float64)
    difference = float(np.abs(draw(case, pipeline) - expected).max())
    if not difference <= TOLERANCE:
        raise ValueError(f"the picture differs from the trainer's by {difference:.2f} of 255")
    return difference


def draw(case: Case, pipeline: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the picture of a pipeline in the range 0 to 255, (H, W, 3)."""
    # The trainer's steps of DDIM: equal strides from the last timestep to the first one.
    stride = (pipeline.scheduler.config.num_train_timesteps - 1) // NUM_STEPS
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="leading", steps_offset=stride, clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    inputs: dict[str, Any] = {}
    if case.kind.startswith("controlnet"):
        inputs["image"] = Image.open(case.condition).convert("RGB")
    images = pipeline(
        case.prompt,
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=NUM_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        latents=load_file(case.noise)["noise"],
        output_type="np",
        **inputs,
    ).images
    picture: np.ndarray[Any, np.dtype[Any]] = images[0].astype(np.float64) * 255
    return picture


def read_pipeline(case: Case) -> Any:
    """Return a complete pipeline, after a check of the names in each of its parts."""
    pipeline = _open(Path(case.output))
    for part in _SUBMODULES:
        if hasattr(pipeline, part):
            check_names(type(getattr(pipeline, part)), Path(case.output) / part)
    return pipeline


def read_lora(case: Case) -> Any:
    """Return the base with a LoRA, loaded as diffusers does."""
    pipeline = _open(Path(case.base))
    (file,) = Path(case.output).glob("*.safetensors")
    pipeline.load_lora_weights(case.output, weight_name=file.name)
    _check_adapters(pipeline, file)
    return pipeline


def read_kohya(case: Case) -> Any:
    """Return the base with a LoRA in kohya's names, loaded as diffusers does, or as the web UIs do if it is DoRA.

    diffusers cannot read magnitudes in the shape in which kohya's files have them.
    """
    (file,) = Path(case.output).glob("*.safetensors")
    is_dora = any(name.endswith(".dora_scale") for name in load_file(file))
    return read_webui(case) if is_dora else read_lora(case)


def read_webui(case: Case) -> Any:
    """Return the base with a LoRA in kohya's names, merged as the web UIs do."""
    pipeline = _open(Path(case.base))
    (file,) = Path(case.output).glob("*.safetensors")
    merge_kohya(pipeline, file, Path(case.original))
    return pipeline


def read_embedding(case: Case) -> Any:
    """Return the base with the vectors of a new token, from one file for each text encoder."""
    pipeline = _open(Path(case.base))
    files = sorted(Path(case.output).glob("*.safetensors"))
    encoders = _encoders(pipeline)
    if [file.name for file in files] != ["learned_embeds.safetensors", "learned_embeds_2.safetensors"][: len(encoders)]:
        raise ValueError(f"the files are {', '.join(file.name for file in files)}")
    for file, encoder in zip(files, encoders, strict=True):
        pipeline.load_textual_inversion(
            str(file), text_encoder=getattr(pipeline, encoder), tokenizer=_tokenizer(pipeline, encoder)
        )
        (vectors,) = load_file(file).values()
        _check_vectors(pipeline, encoder, vectors)
    return pipeline


def read_webui_embedding(case: Case) -> Any:
    """Return the base with the vectors of a new token, from one file in the format of the web UIs."""
    pipeline = _open(Path(case.base))
    (file,) = Path(case.output).glob("*.safetensors")
    vectors = load_file(file)
    is_xl = hasattr(pipeline, "text_encoder_2")
    keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"} if is_xl else {"text_encoder": "emb_params"}
    if set(vectors) != set(keys.values()):
        raise ValueError(f"the file has the tensors {', '.join(vectors)}")
    for encoder, key in keys.items():
        pipeline.load_textual_inversion(
            {key: vectors[key]},
            token=case.token,
            text_encoder=getattr(pipeline, encoder),
            tokenizer=_tokenizer(pipeline, encoder),
        )
        _check_vectors(pipeline, encoder, vectors[key])
    return pipeline


def read_controlnet(case: Case) -> Any:
    """Return the base with a ControlNet."""
    kind = StableDiffusionXLControlNetPipeline if case.family == "sdxl" else StableDiffusionControlNetPipeline
    check_names(ControlNetModel, Path(case.output))
    controlnet = ControlNetModel.from_pretrained(case.output)
    return kind.from_pretrained(case.base, controlnet=controlnet, **_options(Path(case.base)))


def read_single_file(case: Case) -> Any:
    """Return a complete pipeline from one file with the names of the original code."""
    (file,) = Path(case.output).glob("*.safetensors")
    kind = StableDiffusionXLPipeline if case.family == "sdxl" else StableDiffusionPipeline
    options = {} if case.family == "sdxl" else {"safety_checker": None}
    pipeline = kind.from_single_file(str(file), config=case.base, torch_dtype=torch.float32, **options)
    _check_equals_original_names(case, set(load_file(file)))
    _check_equal_parts(pipeline, Path(case.output).parent / "diffusers")
    return pipeline


def _check_equal_parts(pipeline: Any, folder: Path) -> None:
    """Check that all parts of a pipeline have the tensors of another one, which is in a folder."""
    other = _open(folder)
    for part in (name for name in _SUBMODULES if hasattr(other, name)):
        found, expected = getattr(pipeline, part).state_dict(), getattr(other, part).state_dict()
        if found.keys() != expected.keys():
            raise ValueError(f"{part} has other tensors: {', '.join(sorted(found.keys() ^ expected.keys())[:4])}")
        for name, value in expected.items():
            if not torch.equal(found[name], value):
                raise ValueError(f"{part}.{name} differs from that of {folder.name}")


def _check_equals_original_names(case: Case, names: set[str]) -> None:
    """Check that a file has the names of the base in the original layout, and those that only programs expect."""
    more = {name for name in names if name.endswith(("position_ids", "logit_scale"))}
    more |= {name for name in names if case.family == "sd2" and name.endswith("text_projection")}
    if names - more != set(load_file(case.original)):
        raise ValueError(f"other names: {', '.join(sorted(names ^ set(load_file(case.original)))[:4])}")


def read_controlnet_file(case: Case) -> Any:
    """Return the base with a ControlNet from one file with the names of the original code."""
    (file,) = Path(case.output).glob("*.safetensors")
    kind = StableDiffusionXLControlNetPipeline if case.family == "sdxl" else StableDiffusionControlNetPipeline
    config = Path(case.output).parent / "diffusers"
    # diffusers expects the last layer of the encoder for 8 pixels per latent; the tiny bases have fewer pixels.
    tensors = load_file(file)
    last = max(int(name.split(".")[2]) for name in tensors if "input_hint_block" in name)
    renamed = {name.replace(f"hint_block.{last}.", "hint_block.14."): each for name, each in tensors.items()}
    if case.family == "sdxl":
        return kind.from_pretrained(case.base, controlnet=_with_sizes(renamed, config), **_options(Path(case.base)))
    with tempfile.TemporaryDirectory() as folder:
        readable = Path(folder) / "controlnet.safetensors"
        save_file(renamed, readable)
        controlnet = ControlNetModel.from_single_file(str(readable), config=str(config), torch_dtype=torch.float32)
    return kind.from_pretrained(case.base, controlnet=controlnet, **_options(Path(case.base)))


def _with_sizes(tensors: dict[str, Tensor], config: Path) -> Any:
    """Return a ControlNet of SDXL.

    diffusers does not read the embedding of SDXL's sizes in the files of ControlNets; ComfyUI does. In the files of
    complete models diffusers reads it, under the same names.
    """
    controlnet = ControlNetModel.from_pretrained(config)
    found = convert_controlnet_checkpoint(dict(tensors), dict(controlnet.config))
    sizes = DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]
    found |= {name: tensors[f"control_model.{original}"] for name, original in sizes.items()}
    if len(found) != len(tensors):
        raise ValueError(f"{len(found)} of {len(tensors)} tensors were read")
    empty = ControlNetModel.from_config(controlnet.config)
    empty.load_state_dict(found)
    return empty


def read_controlnet_pipeline(case: Case) -> Any:
    """Return a complete pipeline with a ControlNet."""
    for kind, part in ((ControlNetModel, "controlnet"), (UNet2DConditionModel, "unet")):
        check_names(kind, Path(case.output) / part)
    return _open(Path(case.output))


READERS: dict[str, tuple[Callable[[Case], Any], ...]] = {
    "pipeline": (read_pipeline,),
    "lora": (read_lora,),
    "kohya": (read_kohya, read_webui),
    "embedding": (read_embedding,),
    "webui embedding": (read_webui_embedding,),
    "controlnet": (read_controlnet,),
    "controlnet file": (read_controlnet_file,),
    "controlnet pipeline": (read_controlnet_pipeline,),
    "single file": (read_single_file,),
}
"""The ways in which outputs are read, by the kind of a case."""


def check_names(kind: Any, folder: Path) -> None:
    """Check that a class finds all its tensors in a folder, and no others.

    Raises:
        ValueError: it does not.
    """
    options = {} if kind.__module__.startswith("transformers") else {"low_cpu_mem_usage": False}
    _, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    found = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(found.values()):
        raise ValueError(f"{folder.name}: {found}")


def _check_adapters(pipeline: Any, file: Path) -> None:
    """Check that the adapters in the modules are the tensors of the file: none is missing, none has its first value."""
    expected = _sizes(value for name, value in load_file(file).items() if not name.endswith(".alpha"))
    modules = [getattr(pipeline, name) for name in _SUBMODULES if hasattr(pipeline, name)]
    loaded = _sizes(value for module in modules for name, value in module.named_parameters() if ".lora_" in name)
    if len(expected) != len(loaded):
        raise ValueError(f"{len(loaded)} tensors were loaded, the file has {len(expected)}")
    if not np.allclose(expected, loaded, rtol=1e-5):
        raise ValueError("the loaded tensors differ from those of the file")


def _sizes(tensors: Any) -> list[float]:
    return sorted(float(value.detach().double().abs().sum()) for value in tensors)


def _check_vectors(pipeline: Any, encoder: str, vectors: Tensor) -> None:
    table = getattr(pipeline, encoder).get_input_embeddings().weight
    if not torch.equal(table[-len(vectors) :], vectors):
        raise ValueError(f"{encoder} has other vectors than the file")


def _encoders(pipeline: Any) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipeline, name)]


def _tokenizer(pipeline: Any, encoder: str) -> Any:
    return getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))


def _open(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, **_options(folder))


def _options(folder: Path) -> dict[str, Any]:
    has_checker = "safety_checker" in (folder / "model_index.json").read_text(encoding="utf-8")
    return {"safety_checker": None} if has_checker else {}


def check_original(original: str, base: str) -> float:
    """Check that the names in the single file of a base are those of the original code: diffusers reads them.

    Returns:
        The largest difference of a weight from that of the base: 0.

    Raises:
        ValueError: a weight differs.
    """
    kind = StableDiffusionXLPipeline if (Path(base) / "text_encoder_2").is_dir() else StableDiffusionPipeline
    pipeline = kind.from_single_file(original, config=base, **_options(Path(base)))
    _check_equal_parts(pipeline, Path(base))
    return 0.0


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.exit(main(Path(sys.argv[1]).absolute()))
