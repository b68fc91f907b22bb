"""Invalid manifests about volumes, devices and memory of the pods: one for each rule, with its message."""

from __future__ import annotations

from tests.api.bad_manifest import BadManifest

IMAGE = {"reference": "registry.example.com/sdxl:1.0"}
CLAIM = {"accelerator": "gpu", "gpuClaimTemplateName": "gpu"}
BAD_PODS = (
    BadManifest(
        "base-outside-of-image",
        {"spec.model": {"base": "owner/name", "image": IMAGE}},
        "spec.model.base",
        "write base: /finetune/model",
    ),
    BadManifest(
        "base-above-image",
        {"spec.model": {"base": "/finetune/model/../data", "image": IMAGE}},
        "spec.model.base",
        "write base: /finetune/model",
    ),
    BadManifest(
        "revision-of-image",
        {"spec.model": {"base": "/finetune/model", "revision": "main", "image": IMAGE}},
        "spec.model.revision",
        "leave revision out",
    ),
    BadManifest(
        "image-with-scheme",
        {"spec.model": {"base": "/finetune/model", "image": {"reference": "oci://registry.example.com/sdxl"}}},
        "spec.model.image.reference",
        "without a scheme",
    ),
    BadManifest(
        "no-image-reference",
        {"spec.model": {"base": "/finetune/model", "image": {"pullPolicy": "Always"}}},
        "spec.model.image.reference",
        "Required value; write reference",
    ),
    BadManifest(
        "claim-name",
        {"spec.topology.gpuClaimTemplateName": "One_GPU"},
        "spec.topology.gpuClaimTemplateName",
        "not a valid",
    ),
    BadManifest(
        "claim-on-cpu",
        {"spec.topology": CLAIM | {"accelerator": "cpu"}},
        "spec.topology.gpuClaimTemplateName",
        "accelerator is cpu",
    ),
    BadManifest(
        "gpus-and-claim",
        {"spec.topology": CLAIM | {"resources": {"nvidia.com/gpu": 1}}},
        "spec.topology.resources",
        "claims the GPUs",
    ),
    BadManifest(
        "growth-without-memory",
        {"spec.recovery": {"maxMemory": "64Gi"}},
        "spec.recovery.maxMemory",
        "write topology.resources.memory",
    ),
    BadManifest(
        "growth-is-no-quantity",
        {"spec.recovery": {"maxMemory": "64GB"}, "spec.topology.resources": {"memory": "1Gi"}},
        "spec.recovery.maxMemory",
        "write e.g. 128Gi",
    ),
)
