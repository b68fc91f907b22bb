"""Bases that are stored as one file, as the web UIs do: converted once to a folder in diffusers' layout, in the cache.

A `.ckpt` is a pickle. It is read by torch's weights-only reader, which refuses anything else that a pickle can contain.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import secrets
import shutil
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from finetune_contract.input_spec import ModelSpec
from finetune_trainer import patience
from finetune_trainer.errors import ConfigError, StorageError
from finetune_trainer.files import use_default_mode
from finetune_trainer.models.family import SingleFile
from finetune_trainer.models.fingerprint import fingerprint, fingerprint_files
from finetune_trainer.models.layouts.original import UNET, VAE

_LOG = logging.getLogger(__name__)
SUFFIXES = (".safetensors", ".ckpt")
_INDEX = "model_index.json"
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"
"""Names of empty tensors in single files: the base predicts v; its last timestep has no signal."""
_OTHER_PROCESS = {"edm_mean": "EDM", "edm_vpred.sigma_max": "EDM with v-prediction"}
"""Names of tensors in single files of bases with another noise process, e.g. Playground v2.5 and CosXL."""
_PARTS = {
    "denoiser": (UNET,),
    "VAE": (VAE,),
    "text encoder": ("cond_stage_model.", "conditioner."),
}
"""Starts of the names of the parts of a complete model."""
_SCHEDULE = ("alphas_", "betas", "log_", "logvar", "lvlb_", "posterior_", "sqrt_")
_NOT_READ = ("model_ema.", "denoiser.", "scale_factor", *_SCHEDULE)
"""Starts of the names of what training kept in a checkpoint, besides the model."""
_INCOMPLETE = "write a complete checkpoint of a base model"
_OTHER_SHAPE = re.compile(r"Cannot load.* because (\S+ expected shape .*?\]\), but got .*?\]\))")
_NUM_NAMED = 3
"""Names of tensors in a message."""


def convert(
    spec: ModelSpec, cache_dir: Path, formats: Mapping[str, SingleFile], config_commit: str | None = None
) -> Path:
    """Return the folder that a single-file base is converted to; a folder of an earlier job is reused.

    Args:
        spec: the manifest's model, whose base is a file.
        cache_dir: folder that all jobs share.
        formats: single-file formats of the families, by the pipeline class of diffusers.
        config_commit: commit of the configuration if it is from the hub.

    Raises:
        ConfigError: the file or its configuration cannot be read.
        StorageError: the folder cannot be written.
    """
    file = Path(spec.base)
    stat = file.stat()
    names = _tensor_names(file)
    _check_process(file, names)
    config = config_commit or _local_config(spec.config)
    identity = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {config}{_marked_schedule(names) or ''}"
    # An edit can keep size and time. Folders of older releases have a name without the fingerprint.
    candidates = [_folder_of(cache_dir, each) for each in (f"{identity} {fingerprint(file)}", identity)]
    folder = next((each for each in candidates if (each / _INDEX).is_file()), candidates[0])
    if (folder / _INDEX).is_file():
        return folder
    if unused := describe_unused(names):
        _LOG.warning("model.base: %s %s", file, unused)
    # Without a configuration in the manifest, diffusers fetches one from the hub.
    pipeline = patience.wait_out("model.base: reading the file", lambda: _read(file, spec.config, names, formats))
    patience.wait_out("cache: writing the converted base", lambda: _write(pipeline, folder))
    return folder


def configuration_files(folder: Path) -> list[Path]:
    """Return the files of a configuration that the reader of single files uses."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".txt", ".model"))


def _local_config(config: str | None) -> str | None:
    """Return what identifies a configuration in a folder: its path and contents."""
    if config is None or not Path(config).is_dir():
        return config
    found = fingerprint_files(configuration_files(Path(config)))
    return f"{config} {sorted(found.items())}"


def _folder_of(cache_dir: Path, identity: str) -> Path:
    return cache_dir / "bases" / hashlib.sha256(identity.encode()).hexdigest()[:32]


def _write(pipeline: Any, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.writing")
    try:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        use_default_mode([path for path in temporary.rglob("*") if path.is_file()], temporary)
        # The folder exists if another rank or another job was faster.
        with contextlib.suppress(OSError):
            temporary.rename(folder)
    except OSError as error:
        raise StorageError(f"cache: cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_process(file: Path, names: Collection[str]) -> None:
    """Refuse a base of another noise process. diffusers reads its weights with the schedule of SDXL.

    Raises:
        ConfigError: the file contains a marker of such a base.
    """
    for marker, process in _OTHER_PROCESS.items():
        if marker in names:
            raise ConfigError(
                f"model.base: {file} was trained with another noise process ({process}: it contains {marker}), which "
                "is not supported; use a base that was trained by discrete diffusion"
            )


def _marked_schedule(names: Collection[str]) -> dict[str, Any]:
    """Return the fields of the scheduler that the markers in a file define."""
    if _V_PREDICTION not in names:
        return {}
    return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": _ZERO_SNR in names}


def _read(file: Path, config: str | None, names: Collection[str], formats: Mapping[str, SingleFile]) -> Any:
    import diffusers  # noqa: PLC0415  slow to import

    name = _find_pipeline(names, formats)
    try:
        pipeline = getattr(diffusers, name).from_single_file(
            str(file), config=config, torch_dtype=torch.float32, **formats[name].options
        )
        if marked := _marked_schedule(names):
            pipeline.scheduler.register_to_config(**marked)
    except Exception as error:
        # The reader of diffusers raises many kinds of errors. After any of them the file cannot be used.
        problem = find_missing_part(names) or _describe(error)
        raise ConfigError(f"model.base: {file} {problem}") from error
    parts = {each: part for each, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    if problem := _describe_empty(parts):
        raise ConfigError(f"model.base: {file} {problem}")
    return pipeline


def find_missing_part(names: Collection[str]) -> str:
    """Return which part of a model a file lacks, with the remedy; empty if it has all, or other names. Pure."""
    present = [part for part, starts in _PARTS.items() if any(name.startswith(starts) for name in names)]
    missing = [part for part in _PARTS if part not in present]
    if not present or not missing:
        return ""
    example = _PARTS[missing[0]][0]
    return f"lacks the {' and the '.join(missing)}: no tensor has a name like {example}...; {_INCOMPLETE}"


def describe_unused(names: Collection[str]) -> str:
    """Return how many tensors of a file belong to no part of a model, and some names; empty if none does. Pure."""
    known = (*(start for starts in _PARTS.values() for start in starts), *_NOT_READ, _V_PREDICTION, _ZERO_SNR)
    unused = sorted(name for name in names if not name.startswith(known))
    if not unused or len(unused) == len(names):
        return ""
    examples = f"{', '.join(unused[:_NUM_NAMED])}{', ...' if len(unused) > _NUM_NAMED else ''}"
    return f"contains {len(unused)} tensors of no part of the model ({examples}); they are not used"


def _describe(error: Exception) -> str:
    """Return why a file cannot be read, with the remedy."""
    if isinstance(error, KeyError):
        return f"lacks the tensor {error}; {_INCOMPLETE}"
    if isinstance(error, NotImplementedError) and (problem := _describe_empty(_failed_modules(error))):
        return problem
    summary = " ".join(str(error).split())
    if (shape := _OTHER_SHAPE.search(summary)) is not None:
        return (
            f"has tensors of another shape than its configuration: {shape[1]}; write the folder or hub id of the "
            "configuration of this base in model.config"
        )
    return (
        f"cannot be read as a single-file checkpoint: {summary[:300]}; if the hub is not reachable, write a folder "
        "with the base's configuration in model.config"
    )


def _failed_modules(error: Exception) -> dict[str, torch.nn.Module]:
    """Return the model that diffusers was reading, by its class. Its error names no weight, and nothing returns it."""
    found = (frame.f_locals.get("model") for frame, _ in traceback.walk_tb(error.__traceback__))
    return {type(model).__name__: model for model in found if isinstance(model, torch.nn.Module)}


def _describe_empty(parts: Mapping[str, torch.nn.Module]) -> str:
    """Return which weights of models the file has not filled, with the remedy; empty if it has filled all."""
    weights = ((f"{name}.{key}", value) for name, part in parts.items() for key, value in part.state_dict().items())
    empty = [name for name, value in weights if value.is_meta]
    if not empty:
        return ""
    more = f" and {len(empty) - _NUM_NAMED} more" if len(empty) > _NUM_NAMED else ""
    return f"lacks the tensors for {', '.join(empty[:_NUM_NAMED])}{more}; {_INCOMPLETE}"


def _find_pipeline(names: Collection[str], formats: Mapping[str, SingleFile]) -> str:
    """Return the pipeline class for a file with these tensors: the one whose marker is among them, else the default."""
    marked = [pipeline for pipeline, each in formats.items() if each.marker in names]
    default = [pipeline for pipeline, each in formats.items() if each.marker is None]
    return (marked or default)[0]


def _tensor_names(file: Path) -> Collection[str]:
    """Return the names of the tensors in a file.

    Raises:
        ConfigError: the file is damaged or contains more than weights.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  only single files need it

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return set(tensors.keys())
        state = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        summary = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.base: {file} is not a readable checkpoint: {summary}; write a complete .safetensors file"
        ) from error
    except Exception as error:
        # The error class of pickle: some object in the file is not a weight.
        raise ConfigError(
            f"model.base: {file} contains more than weights, which can run code when it is read; write a .safetensors "
            "file"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConfigError(
            f"model.base: {file} contains {_describe_content(state)} instead of named weights; write the complete "
            "checkpoint of a base model"
        )
    return set(state)


def _describe_content(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "a single tensor"
    return "no tensors" if isinstance(value, Mapping) else f"a {type(value).__name__}"
