"""Invalid combinations with `training.script`. Part of the table in `bad_manifests`."""

from __future__ import annotations

from tests.api.bad_manifest import BadManifest

METHOD_SETTINGS = {
    "steps": 5,
    "epochs": 5,
    "batchSize": 2,
    "gradientAccumulation": 2,
    "learningRate": 1e-4,
    "lrScheduler": "cosine",
    "precision": "bf16",
    "gradientCheckpointing": True,
    "resolution": 64,
    "randomFlip": True,
    "snrGamma": 5.0,
    "noiseOffset": 0.1,
    "seed": 1,
    "ema": True,
    "memoryPreset": "auto",
}
"""Settings of methods that a script does not read, with another value than the default."""

BAD_SCRIPTS = (
    BadManifest(
        "method-and-script", {"spec.training.script": {"path": "/x.py"}}, "spec.training.script", "leave script out"
    ),
    BadManifest(
        "lora-for-script", {"spec.training.lora": {"rank": 4}}, "spec.training.lora", "leave lora", base="script"
    ),
    BadManifest(
        "from-for-a-script",
        {"spec.checkpoint.from": {"job": "circles"}},
        "spec.checkpoint.from",
        "leave from out",
        base="script",
    ),
    BadManifest(
        "streamed-script",
        {"spec.dataset.streaming": True},
        "spec.dataset.streaming",
        "leave streaming out",
        base="script",
    ),
    BadManifest(
        "validation-of-script",
        {"spec.training.validation": {"prompts": ["a dog"]}},
        "spec.training.validation",
        "leave validation out",
        base="script",
    ),
    *(
        BadManifest(
            f"{field}-of-script",
            {f"spec.training.{field}": value},
            f"spec.training.{field}",
            f"leave {field} out",
            base="script",
        )
        for field, value in METHOD_SETTINGS.items()
    ),
    BadManifest(
        "script-without-file",
        {"spec.training.script": {"args": {"seed": 1}}},
        "spec.training.script",
        "exactly one of path and configMap",
        base="script",
    ),
    BadManifest(
        "image-and-configmap",
        {"spec.training.script": {"configMap": {"name": "mine"}, "image": "a/b:1"}},
        "spec.training.script.image",
        "leave image out",
        base="script",
    ),
    BadManifest(
        "script-of-no-object",
        {"spec.training.script": {"configMap": {"name": "Mine"}}},
        "spec.training.script.configMap.name",
        "lower-case letters",
        base="script",
    ),
    BadManifest(
        "elastic-script",
        {"spec.topology": {"minNodes": 1, "maxNodes": 2}},
        "spec.topology.minNodes",
        "write nodes, and leave minNodes and maxNodes out",
        base="script",
    ),
    BadManifest(
        "script-in-a-bucket",
        {"spec.checkpoint.storage": {"bucket": {"url": "s3://models/a"}}},
        "spec.checkpoint.storage",
        "write persistentVolumeClaim, hostPath or nfs",
        base="script",
    ),
    BadManifest(
        "script-with-scratch",
        {"spec.checkpoint.scratch": {}},
        "spec.checkpoint.scratch",
        "leave scratch out",
        base="script",
    ),
    BadManifest(
        "precision-as-written",
        {"spec.outputs": [{"format": "asWritten", "to": "out", "precision": "bf16"}]},
        "spec.outputs[0].precision",
        "write format: diffusers, or leave precision out",
        base="script",
    ),
    BadManifest(
        "rank-as-written",
        {"spec.outputs": [{"format": "asWritten", "to": "out", "rank": 4}]},
        "spec.outputs[0].rank",
        "write format: diffusers, or leave rank out",
        base="script",
    ),
    BadManifest(
        "trigger-as-written",
        {"spec.outputs": [{"format": "asWritten", "to": "out", "triggerPhrase": "sks"}]},
        "spec.outputs[0].triggerPhrase",
        "write format: diffusers, or leave triggerPhrase out",
        base="script",
    ),
)
