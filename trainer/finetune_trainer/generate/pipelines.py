"""Builds the pipelines of diffusers that draw, from the parts of a base, and puts what was trained into them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_contract.input_spec import ModelSpec
from finetune_trainer.errors import ConfigError, RankError
from finetune_trainer.export.formats.diffusers_folder import INDEX
from finetune_trainer.export.formats.merge import merged_weight
from finetune_trainer.methods.controlnet import find_mismatch
from finetune_trainer.methods.embedding_file import find_embedding_files, read_embeddings
from finetune_trainer.models import parts
from finetune_trainer.models.base import FAMILIES, open_base
from finetune_trainer.models.family import Family
from finetune_trainer.models.layouts.original import CONTROL, controlnet_to_original
from finetune_trainer.models.layouts.trained import TrainedAdapter
from finetune_trainer.models.text_names import portable_text_name
from finetune_trainer.weights.lazy import in_memory, read_file

_CONTROLNET = "ControlNet"


@contextmanager
def named(flag: str) -> Iterator[None]:
    """Let messages about a base name the flag of the command instead of the field of a manifest.

    Raises:
        RankError: of the same kind, with the flag.
    """
    try:
        yield
    except RankError as error:
        text = re.sub(r"^(model\.base|outputs):", f"{flag}:", str(error)).replace("model.config", "--base")
        raise type(error)(text) from error


def open_folder(folder: Path) -> Family:
    """Return the base in a folder that an output has written, also one with a ControlNet.

    Raises:
        ConfigError: it is of no known family.
    """
    pipeline = str(parts.read_config(folder / INDEX).get("_class_name")).replace(_CONTROLNET, "")
    if pipeline not in FAMILIES:
        return open_base(ModelSpec(base=str(folder)))
    return FAMILIES[pipeline](folder, folder / "vae", None)


def load_pipeline(family: Family, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the text-to-image pipeline of a base.

    It has no safety checker: a black picture would say nothing about the training.
    """
    import diffusers  # noqa: PLC0415  slow to import

    folder = family.pipeline
    encoders = family.load_text_encoder(device, dtype).parts
    vae = parts.load_part(
        folder.vae,
        folder.vae_variant,
        "VAE",
        lambda options: diffusers.AutoencoderKL.from_pretrained(folder.vae, torch_dtype=dtype, **options),
    )
    name = str(folder.index["_class_name"]).replace(_CONTROLNET, "")
    given: dict[str, Any] = {
        **{each.name: each.model for each in encoders},
        **{each.name.replace("text_encoder", "tokenizer"): each.tokenizer for each in encoders},
        "vae": vae,
        "unet": family.load_denoiser(dtype),
        "scheduler": _scheduler(folder.folder, folder.index),
    }
    given |= {"add_watermarker": False} if "text_encoder_2" in given else _WITHOUT_CHECKER
    pipeline = getattr(diffusers, name)(**given).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


_WITHOUT_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _scheduler(folder: Path, index: Mapping[str, Any]) -> Any:
    import diffusers  # noqa: PLC0415  slow to import

    kind = getattr(diffusers, parts.class_of(index, "scheduler") or "DDIMScheduler")
    return kind.from_pretrained(folder / "scheduler")


def with_controlnet(pipeline: Any, controlnet: Any) -> Any:
    """Return a pipeline of the same parts with a ControlNet."""
    import diffusers  # noqa: PLC0415  slow to import

    name = type(pipeline).__name__.removesuffix("Pipeline")
    extra = {"add_watermarker": False} if hasattr(pipeline, "text_encoder_2") else _WITHOUT_CHECKER
    known = {key: value for key, value in pipeline.components.items() if value is not None}
    made = getattr(diffusers, f"{name}{_CONTROLNET}Pipeline")(**{**known, **extra, "controlnet": controlnet})
    made.set_progress_bar_config(disable=True)
    return made


def load_controlnet(path: Path, family: Family, unet: Any, flag: str) -> Any:
    """Return a ControlNet on the device of the UNet: a folder of diffusers, or a file with original names.

    Raises:
        ConfigError: it cannot be read, or is for another kind of base.
    """
    source = path if path.is_dir() else None
    try:
        controlnet = family.load_controlnet(unet, source)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"{flag}: the ControlNet in {path} cannot be read: {' '.join(str(error).split())[:200]}; write a complete "
            "one for a base of this kind"
        ) from error
    if source is None:
        _fill_controlnet(controlnet, path, flag)
    if problem := find_mismatch(controlnet.config, unet.config, family.pixels_per_latent):
        raise ConfigError(f"{flag}: the ControlNet in {path} {problem}; write its own base in --base")
    return controlnet.to(unet.device, unet.dtype).eval()


@torch.no_grad()
def _fill_controlnet(controlnet: Any, path: Path, flag: str) -> None:
    """Copy the weights of a file with the names of the original code, or with those of diffusers."""
    state = controlnet.state_dict()
    found = {name.removeprefix(CONTROL): value for name, value in read_file(path).items()}
    originals = {name: name for name in state}
    if not state.keys() <= found.keys():
        own = {name: in_memory(value) for name, value in state.items()}
        names = {id(value): name for name, value in own.items()}
        originals = {names[id(value)]: new for new, value in controlnet_to_original(own).items()}
    if missing := [new for new in originals.values() if new not in found]:
        raise ConfigError(
            f"{flag}: {path} lacks {missing[0]} of a ControlNet for this base; write its own base in --base"
        )
    for name, new in originals.items():
        value = found[new].read()
        if value.numel() != state[name].numel():
            raise ConfigError(
                f"{flag}: {new} of {path} has the shape {list(value.shape)}, and the base needs "
                f"{list(state[name].shape)}; write its own base in --base"
            )
        state[name].copy_(value.reshape(state[name].shape))


@torch.no_grad()
def set_strength(pipeline: Any, lora: TrainedAdapter, strength: float) -> None:
    """Give the adapted weights of a pipeline the values of its base plus the LoRA, as the format `merged` writes them.

    Strength 0 gives the weights of the base.
    """
    by_part: dict[str, dict[str, str]] = {}
    for name in lora.layers:
        part, _, module = name.partition(".")
        by_part.setdefault(part, {})[f"{module}.weight"] = name
    for part, modules in by_part.items():
        sources = lora.family.pipeline.tensors(part)
        is_text = lora.family.pipeline.is_text(part)
        weights = {
            portable_text_name(name) if is_text else name: value
            for name, value in getattr(pipeline, part).state_dict().items()
        }
        for weight, layer in modules.items():
            source = sources[weight].to(torch.float32)
            merged = merged_weight(source, lora.layers[layer], strength, layer) if strength else source
            weights[weight].copy_(merged.read().reshape(weights[weight].shape))


def add_embedding(pipeline: Any, path: Path, family: Family, words: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """Add the vectors of a word to the text encoders, and return the words that prompts can use.

    Args:
        pipeline: the pipeline.
        path: a folder with the files of diffusers, or one file, also of the web UIs.
        family: the base.
        words: further words for the vectors, e.g. that of the training.
        flag: the flag that names the path, for messages.

    Raises:
        ConfigError: the files are no embedding for this base.
    """
    files = find_embedding_files(path)
    encoders = family.load_text_encoder(torch.device("meta")).parts
    vectors: dict[str, Tensor] = {}
    for number, part in enumerate(encoders):
        found = read_embeddings(files[min(number, len(files) - 1)], flag)
        value: Tensor | None = found.get(part.webui_key)
        if value is None and len(found) == 1 and (number == 0 or len(files) > 1):
            (value,) = found.values()
            words = (*found, *words) if part.webui_key not in found else words
        width = part.core.embeddings.token_embedding.weight.shape[1]
        if value is None or value.shape[1] != width:
            raise ConfigError(
                f"{flag}: {path} has no vectors of width {width} for the {part.name} of the base; write its own base "
                "in --base"
            )
        vectors[part.name] = value.float()
    is_of_diffusers = any(word in words for word in read_embeddings(files[0], flag))
    # The web UIs use the name of the file as the word.
    names = tuple(dict.fromkeys(words if is_of_diffusers else (*words, files[0].stem)))
    for word in names:
        for encoder, value in vectors.items():
            pipeline.load_textual_inversion(
                {word: value},
                token=word,
                text_encoder=getattr(pipeline, encoder),
                tokenizer=getattr(pipeline, encoder.replace("text_encoder", "tokenizer")),
            )
    return names


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """Return the device and the number format, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {str(dtype).removeprefix('torch.')}"
