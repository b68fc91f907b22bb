"""What would make a job faster: from the measured steps and the settings to sentences for users. Pure.

Each advice names the field to write. A field that is fixed after the first attempt is for a new job; see
`api.rules.edits`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_contract.heartbeat import Performance, StepSettings, StepShares
from finetune_contract.spec import ExchangePrecision, Precision, SwitchMode
from finetune_operator.api.job import Accelerator, FineTuneJobSpec
from finetune_operator.api.quantity import parse_quantity
from finetune_operator.api.status import Bottleneck
from finetune_operator.manifests import num_nodes
from finetune_operator.manifests.resources import EFA_RESOURCE, uses_efa

NOTABLE = 0.1
"""A part of the step limits the speed from this share of its time on."""
NOTABLE_STALL = 0.03
"""The same for the pauses of checkpoints, whose interval is chosen so that they take less."""
FREE_MEMORY = 0.5
"""A GPU has room for a larger batch if less than this share of its memory is in use."""
MUCH_FREE_MEMORY = 0.35
"""A GPU has room for the activations if less than this share of its memory is in use with checkpointing."""
FULL = 0.85
"""Share of the memory that a larger batch may use."""
MAX_BATCH = 4096
CPU = "cpu"


@dataclass(frozen=True)
class Advice:
    """One way to make a job faster.

    Attributes:
        text: the cause, and what to write.
        changes: the edit, by the paths of its fields; None: leave the field out.
    """

    text: str
    changes: Mapping[str, Any] = field(default_factory=dict)


def bottleneck(shares: StepShares) -> Bottleneck:
    """Return what limits the speed: the largest share of the step besides computation, if it is notable."""
    waits = {
        Bottleneck.HOST: shares.host,
        Bottleneck.DATA: shares.data,
        Bottleneck.EXCHANGE: shares.exchange,
        Bottleneck.CHECKPOINT: shares.checkpoint,
    }
    worst = max(waits, key=lambda name: waits[name])
    return worst if waits[worst] >= NOTABLE else Bottleneck.COMPUTE


def advise(spec: FineTuneJobSpec, measured: Performance) -> tuple[Advice, ...]:
    """Return what would make a job faster, most important first.

    Args:
        spec: the job's spec.
        measured: the figures of its ranks together, with the settings of rank 0.
    """
    shares, settings = measured.shares, measured.settings
    if shares is None or settings is None:
        return ()
    found: list[tuple[float, Advice]] = []
    for share, least, advices in (
        (shares.host, NOTABLE, _host(spec, settings)),
        (shares.data, NOTABLE, _data(spec)),
        (shares.exchange, NOTABLE, _exchange(spec, settings)),
        (shares.checkpoint, NOTABLE_STALL, _checkpoint(spec)),
    ):
        if share >= least:
            found += [(share, advice) for advice in advices]
    found.sort(key=lambda each: -each[0])
    return (*(advice for _, advice in found), *_compute(spec, measured, settings))


def _host(spec: FineTuneJobSpec, settings: StepSettings) -> Iterator[Advice]:
    """Yield how the host prepares fewer operations. Only GPUs wait for it."""
    training = spec.training
    reason, is_compiled = settings.cuda_graphs_off, training.compile is SwitchMode.ON
    if training.cuda_graphs is SwitchMode.OFF:
        yield Advice(
            "host-bound: cudaGraphs is off because the manifest says so; write training.cudaGraphs: auto",
            {"spec.training.cudaGraphs": "auto"},
        )
    elif settings.is_sharded and not settings.has_cuda_graphs:
        yield Advice(
            f"host-bound: {reason or 'sharding runs without CUDA graphs'}; leave training.sharding and "
            "training.offload out of a new job if the model fits the GPU",
            {"spec.training.sharding": None, "spec.training.offload": None},
        )
    elif not settings.has_cuda_graphs and settings.gradient_checkpointing and _has_dropout(spec) and is_compiled:
        yield Advice(
            f"host-bound: {reason or 'compiled dropout with gradientCheckpointing runs without CUDA graphs'}; leave "
            "training.compile out",
            {"spec.training.compile": None},
        )
    else:
        why = reason or "each operation is so short that launching it takes longer"
        yield Advice(f"host-bound: {why}; {_larger_batch_text(spec, 2)}", _larger_batch(spec, 2))


def _has_dropout(spec: FineTuneJobSpec) -> bool:
    lora = spec.training.lora
    return lora is not None and lora.dropout > 0


def _data(spec: FineTuneJobSpec) -> Iterator[Advice]:
    """Yield how samples are ready earlier."""
    if spec.dataset.shuffle_tags is not None:
        yield Advice(
            "data-bound: dataset.shuffleTags encodes captions in each step; leave dataset.shuffleTags out of a new job",
            {"spec.dataset.shuffleTags": None},
        )
    cores = _more_cores(spec)
    yield Advice(
        f"data-bound: the loop waits for samples; write topology.resources.cpu: {cores}, or put the cache on faster "
        "storage",
        {"spec.topology.resources": {**(spec.topology.resources or {}), CPU: cores}},
    )


def _more_cores(spec: FineTuneJobSpec) -> int:
    """Return twice the requested cores of a pod, at least four per rank."""
    ranks = spec.topology.processes_per_node
    try:
        requested = float(parse_quantity(str((spec.topology.resources or {}).get(CPU, 1))))
    except ValueError:
        requested = 1.0
    return max(4 * ranks, math.ceil(2 * requested))


def _exchange(spec: FineTuneJobSpec, settings: StepSettings) -> Iterator[Advice]:
    """Yield how the ranks wait less for each other's gradients."""
    if settings.exchange_precision == ExchangePrecision.FP32:
        yield Advice(
            "exchange-bound: gradients are sent in fp32; write training.exchangePrecision: bf16 in a new job",
            {"spec.training.exchangePrecision": "bf16"},
        )
    if spec.topology.accelerator is Accelerator.GPU and num_nodes(spec) > 1 and not uses_efa(spec.topology):
        yield Advice(
            "exchange-bound: on AWS, use nodes and an image with Elastic Fabric Adapters, and add "
            f"{EFA_RESOURCE}: 1 to topology.resources",
            {"spec.topology.resources": {**(spec.topology.resources or {}), EFA_RESOURCE: 1}},
        )
    more = min(MAX_BATCH, 2 * spec.training.gradient_accumulation)
    yield Advice(
        "exchange-bound: the ranks wait for each other; exchange less often with training.gradientAccumulation: "
        f"{more} in a new job, or use a faster network",
        {"spec.training.gradientAccumulation": more},
    )


def _checkpoint(spec: FineTuneJobSpec) -> Iterator[Advice]:
    """Yield how checkpoints pause the training less."""
    interval = spec.checkpoint.interval
    if interval.steps is not None or interval.seconds is not None:
        yield Advice(
            "checkpoint-bound: saves pause the training; leave checkpoint.interval out of a new job, so that it is "
            "chosen by their cost",
            {"spec.checkpoint.interval": None},
        )


def _compute(spec: FineTuneJobSpec, measured: Performance, settings: StepSettings) -> Iterator[Advice]:
    """Yield how the device computes faster, whatever else limits the speed now."""
    training = spec.training
    if settings.precision == Precision.FP32 and settings.has_bf16:
        yield Advice(
            "precision is fp32 on a device with bf16; write training.precision: bf16 in a new job",
            {"spec.training.precision": "bf16"},
        )
    if spec.topology.accelerator is not Accelerator.GPU:
        return
    if training.compile is SwitchMode.OFF:
        yield Advice(
            "compile is off because the manifest says so; write training.compile: auto",
            {"spec.training.compile": "auto"},
        )
    used, total = measured.memory_allocated_bytes, measured.memory_total_bytes
    if used and total:
        yield from _memory(spec, settings, used / total)


def _memory(spec: FineTuneJobSpec, settings: StepSettings, share: float) -> Iterator[Advice]:
    """Yield what the free memory of the GPU can be used for."""
    if share >= FREE_MEMORY:
        return
    used = f"{share:.0%} of the GPU's memory is used"
    preset = spec.training.memory_preset
    if preset is not None and preset != "auto":
        yield Advice(
            f"memoryPreset is {preset}, and {used}; write training.memoryPreset: auto in a new job",
            {"spec.training.memoryPreset": "auto"},
        )
    elif settings.gradient_checkpointing and share < MUCH_FREE_MEMORY:
        yield Advice(
            f"gradientCheckpointing computes activations twice, and {used}; write training.gradientCheckpointing: "
            "false in a new job",
            {"spec.training.gradientCheckpointing": False},
        )
    else:
        factor = max(2, 2 ** int(math.log2(FULL / share)))
        if _larger_batch(spec, factor):
            yield Advice(f"{used}; {_larger_batch_text(spec, factor)}", _larger_batch(spec, factor))


def _larger_batch(spec: FineTuneJobSpec, factor: int) -> dict[str, Any]:
    """Return the edit for a larger batch, with the same global batch where that is possible; empty at the limit."""
    training = spec.training
    size = min(MAX_BATCH, factor * training.batch_size)
    if size == training.batch_size:
        return {}
    changes: dict[str, Any] = {"spec.training.batchSize": size}
    if training.gradient_accumulation % factor == 0:
        changes["spec.training.gradientAccumulation"] = training.gradient_accumulation // factor
    return changes


def _larger_batch_text(spec: FineTuneJobSpec, factor: int) -> str:
    changes = _larger_batch(spec, factor)
    if not changes:
        return "the batch has its largest size"
    fields = " and ".join(f"{path.removeprefix('spec.')}: {value}" for path, value in changes.items())
    note = ", for the same global batch" if len(changes) > 1 else ""
    return f"write {fields} in a new job{note}"
