"""What would make a job faster: tables, and every advice is accepted by the checks of a job."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_contract.heartbeat import Performance, StepSettings, StepShares
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.rules.edits import forbidden_edits
from finetune_operator.api.rules.supported import find_missing
from finetune_operator.api.status import Bottleneck
from finetune_operator.api.validate import broken_rules, parse_job
from finetune_operator.plan.policies.acceptance import find_unsupported
from finetune_operator.plan.report.advice import Advice, advise, bottleneck
from finetune_operator.settings import Settings
from tests.api.manifests import REMOVED, SMALLEST, Document, patched

LORA: dict[str, Any] = {"spec.training.precision": "bf16", "spec.training.batchSize": 4}
FULL_METHOD = {**LORA, "spec.training.method": "Full"}
CPU = {"spec.topology.accelerator": "cpu"}
OFF = "cudaGraphs is off because"
SHARDED = f"{OFF} sharding gathers weights from other ranks in each pass"
DROPOUT = f"{OFF} gradientCheckpointing repeats the dropout of compiled adapters with saved random state"
GPU_BYTES = 80 * 2**30


def shares(**parts: float) -> StepShares:
    return StepShares(compute=1 - sum(parts.values()), **parts)


def measure(used: float = 0.7, device: str = "NVIDIA H100 80GB HBM3", **changes: Any) -> Performance:
    """Return figures of GPUs with this share of their memory in use."""
    settings = {"precision": "bf16", "batch_size": 4, "has_bf16": True, "has_cuda_graphs": True, "is_compiled": True}
    parts = changes.pop("shares", {})
    chosen = StepSettings(device=device, **{**settings, "exchange_precision": "fp32", **changes})
    is_gpu = device != "cpu"
    return Performance(
        shares=shares(**parts),
        settings=chosen,
        memory_allocated_bytes=int(used * GPU_BYTES),
        memory_total_bytes=GPU_BYTES if is_gpu else None,
    )


NO_GRAPHS: dict[str, Any] = {"has_cuda_graphs": False, "shares": {"host": 0.6}}
CASES: dict[str, tuple[dict[str, Any], Performance, list[str]]] = {
    "nothing": (LORA, measure(), []),
    "small waits": (LORA, measure(shares={"host": 0.05, "data": 0.05, "exchange": 0.05, "checkpoint": 0.02}), []),
    "host, graphs off": (
        {**LORA, "spec.training.cudaGraphs": "off"},
        measure(**NO_GRAPHS, cuda_graphs_off=f"{OFF} the manifest says so"),
        ["host-bound: cudaGraphs is off because the manifest says so; write training.cudaGraphs: auto"],
    ),
    "host, sharded": (
        {**FULL_METHOD, "spec.training.sharding": "full", "spec.training.offload": "none"},
        measure(**NO_GRAPHS, cuda_graphs_off=SHARDED, is_sharded=True),
        [
            f"host-bound: {SHARDED}; leave training.sharding and training.offload out of a new job if the model fits "
            "the GPU"
        ],
    ),
    "host, dropout": (
        {
            **LORA,
            "spec.training.gradientCheckpointing": True,
            "spec.training.lora": {"dropout": 0.1},
            "spec.training.compile": "on",
        },
        measure(**NO_GRAPHS, cuda_graphs_off=DROPOUT, gradient_checkpointing=True),
        [f"host-bound: {DROPOUT}; leave training.compile out"],
    ),
    "host, capture failed": (
        LORA,
        measure(**NO_GRAPHS, cuda_graphs_off=f"{OFF} the capture failed"),
        [f"host-bound: {OFF} the capture failed; write training.batchSize: 8 in a new job"],
    ),
    "host, with graphs": (
        LORA,
        measure(shares={"host": 0.2}),
        [
            "host-bound: each operation is so short that launching it takes longer; write training.batchSize: 8 in a "
            "new job"
        ],
    ),
    "host, dropout in graphs": (
        {**LORA, "spec.training.gradientCheckpointing": True, "spec.training.lora": {"dropout": 0.1}},
        measure(shares={"host": 0.2}, gradient_checkpointing=True),
        [
            "host-bound: each operation is so short that launching it takes longer; write training.batchSize: 8 in a "
            "new job"
        ],
    ),
    "host, largest batch": (
        {**LORA, "spec.training.batchSize": 4096},
        measure(shares={"host": 0.2}),
        ["host-bound: each operation is so short that launching it takes longer; the batch has its largest size"],
    ),
    "data": (
        {**LORA, "spec.topology.resources": {"cpu": "6500m", "memory": "32Gi"}},
        measure(shares={"data": 0.4}),
        [
            "data-bound: the loop waits for samples; write topology.resources.cpu: 13, or put the cache on faster "
            "storage"
        ],
    ),
    "data, shuffled tags": (
        {**LORA, "spec.dataset.shuffleTags": {}, "spec.topology.processesPerNode": 8},
        measure(shares={"data": 0.4}),
        [
            "data-bound: dataset.shuffleTags encodes captions in each step; leave dataset.shuffleTags out of a new job",
            "data-bound: the loop waits for samples; write topology.resources.cpu: 32, or put the cache on faster "
            "storage",
        ],
    ),
    "exchange": (
        {**LORA, "spec.topology.nodes": 4},
        measure(shares={"exchange": 0.4}),
        [
            "exchange-bound: gradients are sent in fp32; write training.exchangePrecision: bf16 in a new job",
            "exchange-bound: on AWS, use nodes and an image with Elastic Fabric Adapters, and add "
            "vpc.amazonaws.com/efa: 1 to topology.resources",
            "exchange-bound: the ranks wait for each other; exchange less often with training.gradientAccumulation: 2 "
            "in a new job, or use a faster network",
        ],
    ),
    "exchange in bf16 over EFA": (
        {
            **LORA,
            "spec.topology.nodes": 4,
            "spec.topology.resources": {"vpc.amazonaws.com/efa": 4},
            "spec.training.exchangePrecision": "bf16",
        },
        measure(shares={"exchange": 0.4}, exchange_precision="bf16"),
        [
            "exchange-bound: the ranks wait for each other; exchange less often with training.gradientAccumulation: 2 "
            "in a new job, or use a faster network",
        ],
    ),
    "exchange within a node": (
        {**LORA, "spec.topology.processesPerNode": 8, "spec.training.exchangePrecision": "bf16"},
        measure(shares={"exchange": 0.4}, exchange_precision="bf16"),
        [
            "exchange-bound: the ranks wait for each other; exchange less often with training.gradientAccumulation: 2 "
            "in a new job, or use a faster network",
        ],
    ),
    "checkpoints": (
        {**LORA, "spec.checkpoint": {"interval": {"steps": 1}}},
        measure(shares={"checkpoint": 0.2}),
        [
            "checkpoint-bound: saves pause the training; leave checkpoint.interval out of a new job, so that it is "
            "chosen by their cost"
        ],
    ),
    "checkpoints of the chosen interval": (LORA, measure(shares={"checkpoint": 0.2}), []),
    "the worst first": (
        {**LORA, "spec.training.cudaGraphs": "off", "spec.checkpoint": {"interval": {"seconds": 1}}},
        measure(shares={"host": 0.1, "checkpoint": 0.3}, has_cuda_graphs=False),
        [
            "checkpoint-bound: saves pause the training; leave checkpoint.interval out of a new job, so that it is "
            "chosen by their cost",
            "host-bound: cudaGraphs is off because the manifest says so; write training.cudaGraphs: auto",
        ],
    ),
    "fp32": (
        {},
        measure(precision="fp32"),
        ["precision is fp32 on a device with bf16; write training.precision: bf16 in a new job"],
    ),
    "fp32 without bf16": ({}, measure(precision="fp32", has_bf16=False), []),
    "fp32 on a CPU": (
        CPU,
        measure(device="cpu", precision="fp32"),
        ["precision is fp32 on a device with bf16; write training.precision: bf16 in a new job"],
    ),
    "compile off": (
        {**LORA, "spec.training.compile": "off"},
        measure(is_compiled=False),
        ["compile is off because the manifest says so; write training.compile: auto"],
    ),
    "compile off on a CPU": ({**LORA, **CPU, "spec.training.compile": "off"}, measure(device="cpu"), []),
    "free memory": (
        LORA,
        measure(used=0.2),
        ["20% of the GPU's memory is used; write training.batchSize: 16 in a new job"],
    ),
    "half of the memory": (
        LORA,
        measure(used=0.45),
        ["45% of the GPU's memory is used; write training.batchSize: 8 in a new job"],
    ),
    "free memory and accumulation": (
        {**LORA, "spec.training.gradientAccumulation": 8},
        measure(used=0.2),
        [
            "20% of the GPU's memory is used; write training.batchSize: 16 and training.gradientAccumulation: 2 in a "
            "new job, for the same global batch"
        ],
    ),
    "free memory, largest batch": ({**LORA, "spec.training.batchSize": 4096}, measure(used=0.2), []),
    "free memory with checkpointing": (
        {**LORA, "spec.training.gradientCheckpointing": True},
        measure(used=0.2, gradient_checkpointing=True),
        [
            "gradientCheckpointing computes activations twice, and 20% of the GPU's memory is used; write "
            "training.gradientCheckpointing: false in a new job"
        ],
    ),
    "some free memory with checkpointing": (
        {**LORA, "spec.training.gradientCheckpointing": True},
        measure(used=0.4, gradient_checkpointing=True),
        ["40% of the GPU's memory is used; write training.batchSize: 8 in a new job"],
    ),
    "a preset for a smaller GPU": (
        {**LORA, "spec.training.memoryPreset": "8GB"},
        measure(used=0.1, gradient_checkpointing=True),
        ["memoryPreset is 8GB, and 10% of the GPU's memory is used; write training.memoryPreset: auto in a new job"],
    ),
}


def make_document(patch: dict[str, Any]) -> Document:
    return patched(SMALLEST, {"metadata.uid": "1f0c3a2b", **patch})


def advice_of(name: str) -> tuple[Document, tuple[Advice, ...]]:
    patch, measured, _ = CASES[name]
    document = make_document(patch)
    return document, advise(parse_job(document).spec, measured)


@pytest.mark.parametrize("name", CASES)
def test_advice(name: str) -> None:
    _, found = advice_of(name)
    assert [advice.text for advice in found] == CASES[name][2]


FOLLOWED = [(name, number) for name in CASES for number in range(len(advice_of(name)[1]))]


@pytest.mark.parametrize(("name", "number"), FOLLOWED)
def test_a_job_that_follows_the_advice_is_accepted(name: str, number: int) -> None:
    """It works in the running job unless the text says that it is for a new one, and names each field that changes."""
    document, found = advice_of(name)
    advice = found[number]
    edit = {path: REMOVED if value is None else value for path, value in advice.changes.items()}
    present = {path for path in edit if edit[path] is not REMOVED or _has(document, path)}
    followed = patched(document, {path: edit[path] for path in present})
    new = parse_job(followed)
    assert [*map(str, broken_rules(new)), *find_missing(new.spec)] == []
    assert find_unsupported(new, Settings(require_storage=False)) == []
    begun = FineTuneJob.model_validate({**document, "status": {"attempt": 1}})
    changed = FineTuneJob.model_validate(followed)
    if advice.changes and changed.spec != begun.spec:
        assert ("new job" in advice.text) == bool(forbidden_edits(begun, changed)), advice.text
    for path in advice.changes:
        assert path.removeprefix("spec.") in advice.text
    assert len(json.dumps(advice.text)) < 400


def _has(document: Document, path: str) -> bool:
    place: Any = document
    for name in path.split("."):
        if not isinstance(place, dict) or name not in place:
            return False
        place = place[name]
    return True


def test_no_advice_without_a_measurement() -> None:
    spec = parse_job(SMALLEST).spec
    assert advise(spec, Performance(shares=shares(host=0.9))) == ()
    assert advise(spec, Performance(settings=measure().settings)) == ()


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, Bottleneck.COMPUTE),
        ({"host": 0.09, "data": 0.09}, Bottleneck.COMPUTE),
        ({"host": 0.1}, Bottleneck.HOST),
        ({"host": 0.2, "data": 0.3}, Bottleneck.DATA),
        ({"exchange": 0.8, "checkpoint": 0.1}, Bottleneck.EXCHANGE),
        ({"checkpoint": 0.5}, Bottleneck.CHECKPOINT),
    ],
)
def test_the_bottleneck_is_the_largest_notable_wait(parts: dict[str, float], expected: Bottleneck) -> None:
    assert bottleneck(shares(**parts)) is expected
