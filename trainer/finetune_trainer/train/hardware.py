"""Applies a memory preset: measures the devices and the base, and calls `preset`. Called once by each rank."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune_contract.methods import TrainedPart, encodes_text
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import LoraSpec, TrainingSpec, WeightPrecision
from finetune_trainer import patience
from finetune_trainer.checkpoint.store.select import JobFolders
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import StorageError
from finetune_trainer.files import write_atomically
from finetune_trainer.intel.processor import this_processor
from finetune_trainer.methods.registry import method_traits
from finetune_trainer.models.family import Family
from finetune_trainer.tensor_file import count_numbers
from finetune_trainer.train.preset import Hardware, PresetChoice, Weights, choose, default_precision, preset_bytes

PRESET_FILE = "preset.json"
"""File in the job's folder: the first attempt's choice of the settings that a checkpoint depends on."""
_KEPT = ("precision", "optimizer", "center_crop", "sharding")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_LORA_SHARE = 5e-4
"""Weights of an adapter of rank 1, as a share of the base. SDXL has attention in most blocks; SD 1.5 needs less."""


def apply_preset(
    spec: RunSpec, family: Family, world: World, folders: JobFolders, env: Mapping[str, str]
) -> PresetChoice | None:
    """Return the settings of the manifest's memoryPreset for these devices, the same on every rank. All ranks call it.

    Returns:
        The choice; None if the manifest has no preset.

    Raises:
        ConfigError: the preset is unknown.
        StorageError: the job's folder cannot be written.
    """
    preset = spec.training.memory_preset
    if preset is None:
        return None
    least = min(world.gather_numbers(preset_bytes(preset) or memory_bytes(world.device, env)))
    least_of_host = min(world.gather_numbers(memory_bytes(torch.device("cpu"), env)))
    hardware = Hardware(
        memory_bytes=least,
        is_gpu=world.device.type == "cuda",
        has_bf16=all(world.gather_numbers(has_bf16(world.device))),
        has_8bit=all(world.gather_numbers(_has_8bit(world.device))),
        host_bytes=least_of_host,
        num_ranks=world.size,
    )
    recorded = read_kept(world, folders)
    training = spec.training.model_copy(update=recorded)
    weights = count_weights(training, family, spec.dataset.shuffle_tags is not None)
    choice = choose(training, hardware, weights, bool(recorded), _may_shard(training, folders))
    if world.is_first and not recorded:
        write_kept(folders, choice.training)
    return choice


def choose_precision(training: TrainingSpec, world: World, folders: JobFolders) -> TrainingSpec:
    """Return the settings with a number format that all devices support; that of the first attempt if there is one.

    All ranks call it. A format that the manifest names is kept.

    Raises:
        StorageError: the job's folder cannot be written.
    """
    if training.precision is not None:
        return training
    recorded = read_kept(world, folders)
    has_format = all(world.gather_numbers(has_bf16(world.device)))
    precision = recorded.get("precision") or default_precision(training, world.device.type == "cuda", has_format)
    chosen = training.model_copy(update={"precision": precision})
    # CPUs always use the same one.
    if world.is_first and not recorded and world.device.type != "cpu":
        write_kept(folders, chosen)
    return chosen


def count_weights(training: TrainingSpec, family: Family, shuffles_tags: bool = False) -> Weights:
    """Return the number of weights that a run holds while it trains, from the headers of the base's files.

    Args:
        training: the settings.
        family: the base model.
        shuffles_tags: whether captions are encoded in each step, because their tags are shuffled.
    """
    denoiser, text = count_numbers(family.denoiser_files()), count_numbers(family.text_encoder_files())
    trained = method_traits(training.method).trains
    held_text = text if encodes_text(training) else 0
    # Text encoders that belong to no method are held in fp32, so that embeddings equal those of the cache.
    live_text = text if shuffles_tags and not encodes_text(training) else 0
    if trained is TrainedPart.BASE:
        return Weights(denoiser, 0, denoiser + held_text, live_text)
    if trained is TrainedPart.CONTROLNET:
        return Weights(denoiser, denoiser, controlnet_weights(denoiser), live_text)
    if trained is TrainedPart.TOKENS:
        return Weights(denoiser, denoiser + held_text, 0, live_text)
    rank = (training.lora or LoraSpec()).rank
    return Weights(denoiser, denoiser + held_text, int(_LORA_SHARE * rank * (denoiser + held_text)), live_text)


def controlnet_weights(denoiser: int) -> int:
    """Return the weights of a ControlNet: the encoder and the middle block have a larger share of larger denoisers.

    It is exact to 1 % for SD 1.5 (361 of 860 million) and SDXL (1,251 of 2,567).
    """
    return int(max(0.4 * denoiser, 0.521 * denoiser - 87_000_000))


def memory_bytes(device: torch.device, env: Mapping[str, str] = os.environ) -> int:
    """Return the memory of this rank's GPU, or its share of the container's available memory."""
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
    """Return whether the device has bf16 instructions; without them bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return this_processor().has_bf16


def _may_shard(training: TrainingSpec, folders: JobFolders) -> bool:
    """Return whether the method and the other settings support sharding."""
    return (
        method_traits(training.method).shardable
        and not training.aspect_buckets
        and training.weight_precision is WeightPrecision.FP32
        and folders.scratch is None
    )


def _has_8bit(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None


def read_kept(world: World, folders: JobFolders) -> dict[str, Any]:
    """Return what an earlier attempt chose, on every rank. A resumed run keeps its format on any hardware."""
    return world.share(_read_choice(folders) if world.is_first else {})


def write_kept(folders: JobFolders, training: TrainingSpec) -> None:
    """Store the choices of the first attempt.

    Raises:
        StorageError: they cannot be written.
    """
    data = training.model_dump_json(include=set(_KEPT)).encode()
    path, bucket = folders.job_dir / PRESET_FILE, folders.bucket
    try:
        write_atomically(path, data)
        if bucket is not None:
            patience.wait_out("checkpoint storage: writing", lambda: bucket.put_new(PRESET_FILE, data))
    except OSError as error:
        raise StorageError(f"checkpoint storage: cannot write {path}: {error.strerror}") from error


def _read_choice(folders: JobFolders) -> dict[str, Any]:
    path, bucket = folders.job_dir / PRESET_FILE, folders.bucket
    if bucket is not None and patience.wait_out("checkpoint storage: reading", lambda: bucket.exists(PRESET_FILE)):
        data = patience.wait_out("checkpoint storage: reading", lambda: bucket.read(PRESET_FILE))
    elif path.is_file():
        # Also of an earlier version, which stored it only here.
        data = path.read_bytes()
    else:
        return {}
    try:
        recorded = TrainingSpec.model_validate(json.loads(data))
    except ValueError:
        return {}
    # An older trainer has recorded fewer settings.
    return {name: getattr(recorded, name) for name in _KEPT if name in recorded.model_fields_set}
