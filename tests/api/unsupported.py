"""Valid manifests that this version refuses, with the advice of each message; `test_advice` applies it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.api.advice import DIFFUSERS, Advice, Edit, T, removed
from tests.api.manifests import GOOD, Document, patched


@dataclass(frozen=True)
class Unsupported:
    """A valid manifest that this version refuses, and the advice of its message."""

    problem: Edit
    """Change of the manifest `base` that causes the refusal."""
    advice: Advice
    base: str = "smallest"

    @property
    def document(self) -> Document:
        """The refused manifest."""
        return patched(GOOD[self.base], self.problem)


SHARDED = {f"{T}.method": "Full", f"{T}.sharding": "full"}
GRAPHS_ON = {f"{T}.cudaGraphs": "on", "spec.topology.accelerator": "gpu"}
IPEX_ON: Edit = {"spec.topology.accelerator": "cpu", "spec.topology.cpu": {"ipex": "on"}}
AUTO_IPEX: Advice = {"write ipex: auto": {"spec.topology.cpu.ipex": "auto"}}
AUTO_GRAPHS = {"write cudaGraphs: auto": {f"{T}.cudaGraphs": "auto"}}
UNSUPPORTED = (
    Unsupported(
        {f"{T}.cudaGraphs": "on", "spec.topology.accelerator": "cpu"},
        AUTO_GRAPHS | {"write accelerator: gpu": {"spec.topology.accelerator": "gpu"}},
    ),
    Unsupported(
        SHARDED | GRAPHS_ON | {f"{T}.offload": "cpu"},
        AUTO_GRAPHS | {"leave sharding and offload out": removed(f"{T}.sharding", f"{T}.offload")},
    ),
    Unsupported(
        GRAPHS_ON
        | {f"{T}.gradientCheckpointing": True, f"{T}.lora": {"rank": 4, "dropout": 0.1}, f"{T}.compile": "on"},
        AUTO_GRAPHS
        | {
            "leave compile out": removed(f"{T}.compile"),
            "leave lora.dropout out": removed(f"{T}.lora.dropout"),
            "leave gradientCheckpointing out": removed(f"{T}.gradientCheckpointing"),
        },
    ),
    Unsupported(
        {
            "spec.topology": {
                "accelerator": "cpu",
                "processesPerNode": 2,
                "resources": {"cpu": "3500m"},
                "cpu": {"coresForCommunication": 1},
            }
        },
        {
            "a smaller number": {"spec.topology.cpu.coresForCommunication": 0},
            "more in resources.cpu": {"spec.topology.resources.cpu": 4},
        },
    ),
    Unsupported(
        {"spec.topology.resources": {"memory": "64Gi"}, "spec.recovery.maxMemory": "32Gi"},
        {
            "at least topology.resources.memory": {"spec.recovery.maxMemory": "64Gi"},
            "leave maxMemory out": removed("spec.recovery.maxMemory"),
        },
    ),
    Unsupported(
        {"spec.topology.cpu": {"ipex": "on"}, "spec.topology.accelerator": "gpu"},
        {
            "write ipex: auto": {"spec.topology.cpu.ipex": "auto"},
            "write accelerator: cpu": {"spec.topology.accelerator": "cpu"},
        },
    ),
    Unsupported(
        {"spec.topology": {"accelerator": "cpu", "cpu": {"ipex": True}}},
        {
            "write ipex: auto": {"spec.topology.cpu.ipex": "auto"},
            "call ipex.optimize in the script": {"spec.topology.cpu.ipex": "auto"},
        },
        base="script",
    ),
    Unsupported(SHARDED | IPEX_ON, AUTO_IPEX | {"leave sharding out": removed(f"{T}.sharding")}),
    Unsupported(IPEX_ON | {f"{T}.compile": "on"}, AUTO_IPEX | {"leave compile out": removed(f"{T}.compile")}),
    Unsupported(SHARDED | {f"{T}.precision": "fp16"}, {"precision: bf16": {f"{T}.precision": "bf16"}}),
    Unsupported(
        SHARDED | {f"{T}.aspectBuckets": True},
        {
            "leave aspectBuckets out": removed(f"{T}.aspectBuckets"),
            "leave sharding out": removed(f"{T}.sharding"),
        },
    ),
    Unsupported(
        {f"{T}.aspectBuckets": True, f"{T}.dreambooth.classPrompt": "a dog", f"{T}.dreambooth.numClassImages": 9},
        {
            "leave aspectBuckets out": removed(f"{T}.aspectBuckets"),
            "leave out classPrompt, classImages, numClassImages and priorLossWeight": removed(
                f"{T}.dreambooth.classPrompt", f"{T}.dreambooth.numClassImages"
            ),
        },
        base="dreambooth",
    ),
    Unsupported(
        {"spec.dataset.source": "/data/circles.arrow"},
        {
            words: {"spec.dataset.source": source}
            for words, source in {
                ".jsonl": "/data/circles.jsonl",
                ".csv": "/data/circles.csv",
                ".parquet": "/data/circles.parquet",
                ".tar file": "/data/circles.tar",
                "a folder": "/data/circles",
                "a hub id": "owner/circles",
            }.items()
        },
    ),
    Unsupported(
        {"spec.dataset.additional": [{"source": "/data/circles.arrow"}]},
        {
            words: {"spec.dataset.additional": [{"source": source}]}
            for words, source in {
                ".jsonl": "/data/circles.jsonl",
                ".csv": "/data/circles.csv",
                ".parquet": "/data/circles.parquet",
                ".tar file": "/data/circles.tar",
                "a folder": "/data/circles",
                "a hub id": "owner/circles",
            }.items()
        },
    ),
    Unsupported({"spec.outputs": [{"format": "single-file", "to": "out"}]}, DIFFUSERS),
    Unsupported({"spec.queueName": "pictures"}, {"leave the queue out": removed("spec.queueName")}),
)
"""Manifests that are valid and not supported: at least one for each message."""
