"""The advice in the messages about volumes, devices and memory of the pods, and the edits that follow it."""

from __future__ import annotations

from typing import Any

from tests.api.manifests import REMOVED

MODEL = "spec.model"
TOPOLOGY = "spec.topology"
BASES: dict[str, dict[str, Any]] = {
    "base: /finetune/model": {f"{MODEL}.base": "/finetune/model"},
    "a folder below it": {f"{MODEL}.base": "/finetune/model/base"},
    "/finetune/model/sdxl": {f"{MODEL}.base": "/finetune/model/sdxl"},
    "leave image out": {f"{MODEL}.image": REMOVED},
}
NO_CLAIM = {f"{TOPOLOGY}.gpuClaimTemplateName": REMOVED}
POD_ADVICE: dict[str, dict[str, dict[str, Any]]] = {
    "base-outside-of-image": BASES,
    "base-above-image": BASES,
    "revision-of-image": {
        "leave revision out": {f"{MODEL}.revision": REMOVED},
        "leave image out": {f"{MODEL}.image": REMOVED},
    },
    "image-with-scheme": {
        "the registry, the name and a tag or a digest, without a scheme": {
            f"{MODEL}.image.reference": f"a.example.com/sdxl@sha256:{'0' * 64}"
        },
        "registry.example.com/models/sdxl:1.0": {f"{MODEL}.image.reference": "registry.example.com/models/sdxl:1.0"},
    },
    "no-image-reference": {"reference": {f"{MODEL}.image.reference": "registry.example.com/models/sdxl:1.0"}},
    "claim-name": {
        "lower-case letters, digits, '-' and '.'": {f"{TOPOLOGY}.gpuClaimTemplateName": "one-gpu.1"},
    },
    "claim-on-cpu": {
        "leave gpuClaimTemplateName out": NO_CLAIM,
        "accelerator: gpu": {f"{TOPOLOGY}.accelerator": "gpu"},
    },
    "gpus-and-claim": {
        "leave nvidia.com/gpu out": {f"{TOPOLOGY}.resources": REMOVED},
        "leave gpuClaimTemplateName out": NO_CLAIM,
    },
    "growth-without-memory": {
        "topology.resources.memory": {f"{TOPOLOGY}.resources": {"memory": "16Gi"}},
        "resources: {memory: 32Gi}": {f"{TOPOLOGY}.resources": {"memory": "32Gi"}},
        "leave maxMemory out": {"spec.recovery.maxMemory": REMOVED},
    },
    "growth-is-no-quantity": {"128Gi": {"spec.recovery.maxMemory": "128Gi"}},
}
