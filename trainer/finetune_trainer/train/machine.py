"""Asking this machine and this base for what `preset` chooses by; called once by each rank."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import SHARDED_METHODS, LoraSpec, Method, TrainingSpec
from finetune_trainer.checkpoint.store.select import Places
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import StorageError
from finetune_trainer.files import write_aside
from finetune_trainer.methods.registry import method_class
from finetune_trainer.models.family import Family
from finetune_trainer.tensor_file import count_numbers
from finetune_trainer.train.preset import Choice, Machine, Weights, choose, preset_bytes

NOTE = "preset.json"
"""File in the job's folder: what the first attempt chose of the things that a checkpoint depends on."""
_KEPT = ("precision", "optimizer", "center_crop", "sharding")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_LORA_SHARE = 5e-4
"""Weights of an adapter of rank 1, as a share of the UNet's; SDXL's attention is all over it, SD 1.5's less."""
_CONTROLNET_SHARE = 0.45
"""The encoder and the middle, of the whole UNet."""


def apply_preset(spec: RunSpec, family: Family, world: World, places: Places, env: Mapping[str, str]) -> Choice | None:
    """The settings that the manifest's memoryPreset comes to on these machines, the same on every rank.

    Returns:
        None where no preset is asked for.

    Raises:
        ConfigError: there is no such preset.
        StorageError: the job's folder cannot be written.
    """
    preset = spec.training.memory_preset
    if preset is None:
        return None
    least = min(world.gather_numbers(preset_bytes(preset) or memory_bytes(world.device, env)))
    least_of_host = min(world.gather_numbers(memory_bytes(torch.device("cpu"), env)))
    machine = Machine(
        memory_bytes=least,
        is_gpu=world.device.type == "cuda",
        has_bf16=all(world.gather_numbers(has_bf16(world.device))),
        has_8bit=all(world.gather_numbers(_has_8bit(world.device))),
        host_bytes=least_of_host,
        num_ranks=world.size,
    )
    noted = world.share(_read_note(places.job_dir / NOTE))
    training = spec.training.model_copy(update=noted)
    weights = count_weights(training, family)
    choice = choose(training, machine, weights, bool(noted), _may_shard(training, places))
    if world.is_first and not noted:
        _write_note(places.job_dir / NOTE, choice.training)
    return choice


def count_weights(training: TrainingSpec, family: Family) -> Weights:
    """How many numbers a method holds while it trains: read from the headers of the base's files."""
    unet, text = count_numbers(family.unet_files()), count_numbers(family.text_encoder_files())
    held_text = text if method_class(training.method).encodes_text(training) else 0
    trains_text = training.dreambooth is not None and training.dreambooth.train_text_encoder
    if training.method in (Method.FULL, Method.DREAMBOOTH):
        return Weights(unet, 0 if trains_text else held_text, unet + (held_text if trains_text else 0))
    if training.method is Method.CONTROLNET:
        return Weights(unet, unet, int(_CONTROLNET_SHARE * unet))
    if training.method is Method.TEXTUAL_INVERSION:
        return Weights(unet, unet + held_text, 0)
    rank = (training.lora or LoraSpec()).rank
    return Weights(unet, unet + held_text, int(_LORA_SHARE * rank * (unet + held_text)))


def memory_bytes(device: torch.device, env: Mapping[str, str] = os.environ) -> int:
    """Memory of this rank's GPU, or its share of what its container has left."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limit = math.inf
    if _CGROUP_LIMIT.is_file() and (text := _CGROUP_LIMIT.read_text(encoding="ascii").strip()) != "max":
        limit = int(text)
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable"):
            limit = min(limit, int(line.split()[1]) * 1024)
    return int(limit) // int(env.get("LOCAL_WORLD_SIZE", "1"))


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is computed by instructions of its own; without them it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def _may_shard(training: TrainingSpec, places: Places) -> bool:
    """Whether slices go with what was asked for besides."""
    return training.method in SHARDED_METHODS and not training.aspect_buckets and places.scratch is None


def _has_8bit(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None


def _read_note(path: Path) -> dict[str, Any]:
    """What an earlier attempt chose; a resumed run goes on in its format, whatever machine it is on."""
    try:
        noted = TrainingSpec.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
    # An older trainer has noted less.
    return {name: getattr(noted, name) for name in _KEPT if name in noted.model_fields_set}


def _write_note(path: Path, training: TrainingSpec) -> None:
    try:
        write_aside(path, training.model_dump_json(include=set(_KEPT)).encode())
    except OSError as error:
        raise StorageError(f"checkpoint storage: cannot write {path}: {error.strerror}") from error
