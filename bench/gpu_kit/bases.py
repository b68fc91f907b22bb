"""Data, bases and loops of the measured cases. Measurements of one architecture and size share the encoded data."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError

from bench.gpu_kit.items import Context, NotPossibleError
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Precision, TrainingSpec
from finetune_trainer import heap
from finetune_trainer.distributed.world import World
from finetune_trainer.report import Reporter
from finetune_trainer.train.artifact_sync import ArtifactSync
from finetune_trainer.train.build import RunBuilder
from finetune_trainer.train.context import RankContext
from finetune_trainer.train.determinism import make_deterministic
from finetune_trainer.train.input_record import InputRecord
from finetune_trainer.train.inputs import RunInputs
from finetune_trainer.train.loop import Loop
from finetune_trainer.train.pin_store import PinStore
from finetune_trainer.train.preemption_notice import PreemptionNotice
from testing.gpu_kit.schedule import CASES, TrainingCase
from testing.measure.architectures import UNETS, RandomFamily
from testing.measure.device import measured_device, reset_peak

NUM_PICTURES = 8
_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
UNETS["sd15_half"] = {**UNETS["sd15"], "block_out_channels": (160, 320, 640, 640)}
"""A quarter of SD 1.5's weights: a state that is saved in seconds."""
_FIELDS = {field.alias or name for name, field in TrainingSpec.model_fields.items()}


def case_of(context: Context, name: str) -> TrainingCase:
    """Return a case by its name, tiny in a trial."""
    return CASES[name].tiny() if context.tiny else CASES[name]


def make_family(case: TrainingCase) -> RandomFamily:
    """Return the base of a case; its weights are made on the device."""
    return RandomFamily(case.family, measured_device())


def write_pictures(context: Context, case: TrainingCase) -> Path:
    """Write a few pictures with captions and conditioning images, once for each resolution. Return the folder."""
    folder = context.folder / "pictures" / str(case.resolution)
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    rows = []
    for index in range(NUM_PICTURES):
        pixels = random.integers(0, 256, (case.resolution // 8, case.resolution // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((case.resolution, case.resolution), Image.Resampling.NEAREST)
        for name in (f"{index}.png", f"edges-{index}.png"):
            picture.save(folder / name, compress_level=1)
        rows.append({"file_name": f"{index}.png", "text": f"picture {index}", "edges": f"edges-{index}.png"})
    metadata.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def make_training(case: TrainingCase, batch: int, settings: Mapping[str, Any]) -> TrainingSpec:
    """Return the training settings of a case.

    Args:
        case: the case.
        batch: images per step.
        settings: additional settings by their manifest names. True and False also stand for "on" and "off".

    Raises:
        NotPossibleError: this version lacks a setting.
    """
    values: dict[str, Any] = {
        "method": case.method,
        "steps": 1000,
        "batchSize": batch,
        "resolution": case.resolution,
        "precision": "bf16",
        "learningRate": 1e-6,
        **case.training,
    }
    for name, value in settings.items():
        values[name] = _switch(name, value) if isinstance(value, bool) else value
    return TrainingSpec.model_validate(values)


def has_setting(name: str) -> bool:
    """Return whether this version has a setting."""
    return name in _FIELDS


def _switch(name: str, value: bool) -> bool | str:
    """Return True or False as the setting writes it.

    Raises:
        NotPossibleError: this version lacks the setting.
    """
    if not has_setting(name):
        raise NotPossibleError(f"this version has no setting training.{name}")
    for written in (value, "on" if value else "off"):
        try:
            TrainingSpec.model_validate({name: written})
        except ValidationError:
            continue
        return written
    raise NotPossibleError(f"this version refuses training.{name}: true, false, on and off")


def make_spec(data: Path, training: TrainingSpec) -> RunSpec:
    """Return a run with these settings."""
    columns = {"conditioning": "edges"} if training.method is not None and training.method.value == "ControlNet" else {}
    return RunSpec.model_validate(
        {
            "namespace": "kit",
            "job": "kit",
            "uid": "kit",
            "model": {"base": "random"},
            "dataset": {"source": str(data), "columns": columns},
            "training": training.model_dump(by_alias=True, exclude_none=True),
            "globalBatch": training.batch_size,
            "checkpointInterval": {"seconds": 604_800},
        }
    )


def make_case_loop(context: Context, case: TrainingCase, training: TrainingSpec) -> tuple[Loop, Path]:
    """Return the product's loop as a rank has it before its first step, and its job's folder.

    All measurements share the cache of encoded data; each has a job of its own.
    """
    device = measured_device()
    make_deterministic(device)
    spec = make_spec(write_pictures(context, case), training)
    job_dir = Path(tempfile.mkdtemp(prefix="job-", dir=context.folder))
    reporter, world = Reporter(0, None), World(0, 1, 0, device)
    cache = context.folder / "cache" / f"{case.family}-{case.resolution}"
    inputs = RunInputs(
        spec=spec,
        family=make_family(case),
        dtype=_DTYPES[training.precision or Precision.BF16],
        bucket=None,
        record=InputRecord.open(spec.job, world, PinStore(job_dir, None), reporter),
        earlier=None,
        needs_checkpoint=False,
        resumes=False,
    )
    rank = RankContext(spec, 1, job_dir, cache, PreemptionNotice(), reporter)
    build = RunBuilder(rank, world, inputs, ArtifactSync(job_dir, None))
    checkpointer = build.make_checkpointer()
    checkpointer.check_storage()
    data = build.prepare_data()
    gc.collect()
    heap.release_free_memory()
    reset_peak()
    method = build.make_method(data)
    state = build.make_state(method)
    checkpointer.restore(state)
    return build.make_loop(method, state, data, checkpointer), job_dir


def gib(num_bytes: float) -> float:
    """Return a number of bytes in GiB."""
    return round(num_bytes / 2**30, 3)


def describe_device() -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
