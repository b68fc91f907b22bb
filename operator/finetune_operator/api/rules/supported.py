"""Settings that the API has a field for and this version's trainer does not support; none is ignored silently.

The plan refuses such a job with the reason NotSupported; `finetune run` refuses it before it starts anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finetune_contract.methods import METHODS, WRITTEN_FORMATS
from finetune_contract.outputs.spec import OutputFormat
from finetune_contract.spec import Precision, Sharding, SwitchMode
from finetune_operator.api.job import Accelerator, FineTuneJobSpec, TopologySpec
from finetune_operator.api.quantity import parse_quantity
from finetune_operator.api.rules.forms import QUANTITY
from finetune_operator.api.rules.rule import join_names

UNREAD_TABLE = ".arrow"


@dataclass(frozen=True)
class Missing:
    """A feature that the trainer lacks."""

    field: str
    """Field that requests the feature."""
    is_requested: Callable[[FineTuneJobSpec], bool]
    message: str
    """The limitation and what to write instead."""


def _written_formats() -> str:
    """Return the methods of each output format, e.g. 'diffusers for every method, kohya for LoRA'."""
    parts = []
    for written in (each for each in OutputFormat if each in WRITTEN_FORMATS):
        methods = [method.value for method, traits in METHODS.items() if written in traits.formats]
        parts.append(f"{written} for {'every method' if len(methods) == len(METHODS) else join_names(methods)}")
    return ", ".join(parts)


def _requires_graphs(spec: FineTuneJobSpec) -> bool:
    # A rule of the API server cannot read a field that is a text or, as YAML 1.1 reads `on`, a boolean.
    return spec.training.cuda_graphs is SwitchMode.ON


def _leaves_cores_to_compute(topology: TopologySpec) -> bool:
    """Return whether each rank has at least one core that is not for communication."""
    amount = str((topology.resources or {}).get("cpu", ""))
    if topology.cpu.cores_for_communication is None or not re.fullmatch(QUANTITY, amount):
        return True
    return parse_quantity(amount) >= topology.processes_per_node * (topology.cpu.cores_for_communication + 1)


def _has_room_to_grow(spec: FineTuneJobSpec) -> bool:
    """Return whether the maximum of the memory is at least the memory."""
    most, memory = spec.recovery.max_memory, str((spec.topology.resources or {}).get("memory", ""))
    if most is None or not (re.fullmatch(QUANTITY, most) and re.fullmatch(QUANTITY, memory)):
        return True
    return parse_quantity(most) >= parse_quantity(memory)


MISSING = (
    Missing(
        "spec.training.cudaGraphs",
        lambda spec: _requires_graphs(spec) and spec.topology.accelerator is Accelerator.CPU,
        "CUDA graphs need GPUs; write cudaGraphs: auto, or write accelerator: gpu",
    ),
    Missing(
        "spec.training.cudaGraphs",
        lambda spec: _requires_graphs(spec) and spec.training.sharding is not Sharding.NONE,
        "sharding gathers weights in each pass, which no CUDA graph can contain; write cudaGraphs: auto, or leave "
        "sharding and offload out",
    ),
    Missing(
        "spec.training.cudaGraphs",
        lambda spec: (
            _requires_graphs(spec)
            and spec.training.compile is SwitchMode.ON
            and spec.training.gradient_checkpointing
            and spec.training.lora is not None
            and spec.training.lora.dropout > 0
        ),
        "gradientCheckpointing repeats the dropout of compiled adapters, which no CUDA graph can contain; write "
        "cudaGraphs: auto, leave compile out, leave lora.dropout out, or leave gradientCheckpointing out",
    ),
    Missing(
        "spec.topology.cpu.coresForCommunication",
        # A rule of the API server that parses an amount would cost too much: amounts have no maximum length.
        lambda spec: not _leaves_cores_to_compute(spec.topology),
        "coresForCommunication leaves no core to compute on: resources.cpu is less than processesPerNode x "
        "(coresForCommunication + 1); write a smaller number, or more in resources.cpu",
    ),
    Missing(
        "spec.recovery.maxMemory",
        # Amounts of resources have no maximum length, so the API server cannot compare them in a rule.
        lambda spec: not _has_room_to_grow(spec),
        "maxMemory is less than topology.resources.memory; write at least topology.resources.memory, or leave "
        "maxMemory out",
    ),
    Missing(
        "spec.topology.cpu.ipex",
        lambda spec: spec.topology.cpu.ipex is SwitchMode.ON and spec.topology.accelerator is Accelerator.GPU,
        "IPEX is for CPUs; write ipex: auto, or write accelerator: cpu",
    ),
    Missing(
        "spec.topology.cpu.ipex",
        lambda spec: spec.topology.cpu.ipex is SwitchMode.ON and spec.training.script is not None,
        "a script optimizes its model itself, so the trainer cannot; write ipex: auto, and call ipex.optimize in the "
        "script",
    ),
    Missing(
        "spec.topology.cpu.ipex",
        lambda spec: spec.topology.cpu.ipex is SwitchMode.ON and spec.training.sharding is not Sharding.NONE,
        "IPEX packs the weights of a layer, which sharding distributes; write ipex: auto, or leave sharding out",
    ),
    Missing(
        "spec.topology.cpu.ipex",
        lambda spec: spec.topology.cpu.ipex is SwitchMode.ON and spec.training.compile is SwitchMode.ON,
        "IPEX computes the layers that compile would compile; write ipex: auto, or leave compile out",
    ),
    Missing(
        "spec.training.precision",
        lambda spec: spec.training.sharding is not Sharding.NONE and spec.training.precision is Precision.FP16,
        "sharding does not support fp16; write precision: bf16",
    ),
    Missing(
        "spec.training.aspectBuckets",
        lambda spec: spec.training.sharding is not Sharding.NONE and spec.training.aspect_buckets,
        "with aspectBuckets the ranks run different numbers of passes, which sharding does not support; leave "
        "aspectBuckets out, or leave sharding out",
    ),
    Missing(
        "spec.training.aspectBuckets",
        lambda spec: (
            spec.training.aspect_buckets
            and spec.training.dreambooth is not None
            and spec.training.dreambooth.class_prompt is not None
        ),
        "class images are square and fit into no batch of another shape; leave aspectBuckets out, or leave out "
        "classPrompt, classImages, numClassImages and priorLossWeight",
    ),
    Missing(
        "spec.dataset.source",
        lambda spec: spec.dataset.source.endswith(UNREAD_TABLE),
        "this version does not read .arrow files; write a .jsonl, .csv, .parquet or .tar file, a folder or a hub id",
    ),
    Missing(
        "spec.dataset.additional",
        lambda spec: any(each.source.endswith(UNREAD_TABLE) for each in spec.dataset.additional),
        "this version does not read .arrow files; write a .jsonl, .csv, .parquet or .tar file, a folder or a hub id",
    ),
    Missing(
        "spec.outputs",
        lambda spec: any(output.format not in _formats(spec) for output in spec.outputs),
        f"this version does not write one of the formats for this method (it writes {_written_formats()}); write "
        "format: diffusers",
    ),
)


def _formats(spec: FineTuneJobSpec) -> frozenset[OutputFormat]:
    """Return the formats that can be written."""
    method = spec.training.method
    return WRITTEN_FORMATS | {OutputFormat.AS_WRITTEN} if method is None else METHODS[method].formats


def find_missing(spec: FineTuneJobSpec) -> Iterator[str]:
    """Yield one message, with the field at its start, for each unsupported feature that a spec requests."""
    for missing in MISSING:
        if missing.is_requested(spec):
            yield f"{missing.field}: {missing.message}."
