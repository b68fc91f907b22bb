"""Invalid combinations with `training.weightPrecision`, and of outputs with methods. A part of `bad_manifests`."""

from __future__ import annotations

from tests.api.bad_manifest import BadManifest

BAD_WEIGHTS = (
    BadManifest(
        "bf16-weights-of-adapters",
        {"spec.training.precision": "bf16", "spec.training.weightPrecision": "bf16"},
        "spec.training.weightPrecision",
        "applies to DreamBooth, Full and ControlNet only",
    ),
    BadManifest(
        "bf16-weights-in-fp32-passes",
        {"spec.training.method": "Full", "spec.training.precision": "fp32", "spec.training.weightPrecision": "bf16"},
        "spec.training.weightPrecision",
        "write precision: bf16, or leave weightPrecision out",
    ),
    BadManifest(
        "bf16-weights-in-slices",
        {
            "spec.training.method": "Full",
            "spec.training.precision": "bf16",
            "spec.training.weightPrecision": "bf16",
            "spec.training.sharding": "full",
        },
        "spec.training.weightPrecision",
        "leave weightPrecision out, or leave sharding out",
    ),
    BadManifest(
        "bf16-weights-of-prodigy",
        {
            "spec.training.method": "Full",
            "spec.training.precision": "bf16",
            "spec.training.weightPrecision": "bf16",
            "spec.training.optimizer": "prodigy",
        },
        "spec.training.weightPrecision",
        "leave weightPrecision out, or write optimizer: adamw",
    ),
    BadManifest(
        "compiled-of-embedding",
        {"spec.outputs": [{"format": "compiled", "to": "out"}]},
        "spec.outputs",
        "write format: diffusers",
        base="textual-inversion",
    ),
)
