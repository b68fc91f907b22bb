"""One manifest for each way of being wrong that we know of, and what a person is told.

The same table is held against `parse_job` and against the API server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_operator.api.job import API_VERSION
from tests.api.manifests import GONE, GOOD, Document, patched


@dataclass(frozen=True)
class Bad:
    """A way of being wrong."""

    name: str
    patch: dict[str, Any]
    """Of `base`."""
    field: str
    """What is to blame."""
    words: str
    """Part of the sentence."""
    base: str = "smallest"
    kubectl_knows: bool = True
    """Whether it gets as far as the API server's checks of a FineTuneJob."""

    @property
    def document(self) -> Document:
        return patched(GOOD[self.base], self.patch)


BAD = (
    # What it is.
    Bad("other-kind", {"kind": "Job"}, "kind", "write kind: FineTuneJob", kubectl_knows=False),
    Bad("no-kind", {"kind": GONE}, "kind", "write kind: FineTuneJob", kubectl_knows=False),
    Bad("other-version", {"apiVersion": "v1"}, "apiVersion", f"write apiVersion: {API_VERSION}", kubectl_knows=False),
    Bad("no-name", {"metadata.name": GONE}, "metadata.name", "Required value; write name", kubectl_knows=False),
    Bad("no-metadata", {"metadata": GONE}, "metadata", "Required value; write metadata", kubectl_knows=False),
    Bad("namespace-is-a-path", {"metadata.namespace": "../x"}, "metadata.namespace", "match", kubectl_knows=False),
    Bad("name-in-capitals", {"metadata.name": "Circles_1"}, "metadata.name", "lower-case letters"),
    Bad("name-with-dot", {"metadata.name": "circles.v1"}, "metadata.name", "lower-case letters"),
    Bad("name-begins-with-digit", {"metadata.name": "1circle"}, "metadata.name", "a letter first"),
    Bad("name-too-long", {"metadata.name": "c" * 52}, "metadata.name", "write a name of at most 51"),
    # Fields that are missing, unknown or misplaced.
    Bad("no-spec", {"spec": GONE}, "spec", "Required value; write spec"),
    Bad("no-model", {"spec.model": GONE}, "spec.model", "Required value; write model"),
    Bad("no-dataset", {"spec.dataset": None}, "spec.dataset", "Required value; write dataset"),
    Bad("no-output-place", {"spec.outputs": [{"format": "webui"}]}, "spec.outputs[0].to", "Required value; write to"),
    Bad("misspelt", {"spec.training.learningrate": 1}, "spec.training.learningrate", "write learningRate"),
    Bad("snake-case", {"spec.training.batch_size": 2}, "spec.training.batch_size", "write batchSize"),
    Bad("flag", {"spec.training.max_train_steps": 2}, "spec.training.max_train_steps", "write spec.training.steps"),
    Bad("misplaced", {"spec.processesPerNode": 2}, "spec.processesPerNode", "write spec.topology.processesPerNode"),
    Bad(
        "invented",
        {"spec.model.flavour": "x"},
        "spec.model.flavour",
        "known here are base, revision, variant, config, vae",
    ),
    Bad("invented-at-top", {"template": {}}, "template", "known here are apiVersion, kind, metadata, spec, status"),
    # Values of the wrong type.
    Bad("quoted-number", {"spec.training.steps": "200"}, "spec.training.steps", "write 200 without quotes"),
    Bad("words-for-number", {"spec.training.steps": "many"}, "spec.training.steps", "must be of type integer"),
    Bad("fraction", {"spec.training.steps": 2.5}, "spec.training.steps", "must be of type integer"),
    Bad("quoted-rate", {"spec.training.learningRate": "1e-4"}, "spec.training.learningRate", "write 0.0001 without"),
    Bad("quoted-bool", {"spec.training.ema": "yes"}, "spec.training.ema", "write true without quotes"),
    Bad("number-for-bool", {"spec.suspend": 1}, "spec.suspend", "write true or false"),
    Bad("number-for-text", {"spec.model.revision": 7}, "spec.model.revision", "write a text"),
    Bad("text-for-fields", {"spec.model": "sd15"}, "spec.model", "must be of type object"),
    Bad("text-for-list", {"spec.outputs": "webui"}, "spec.outputs", "must be of type array"),
    Bad("nothing-in-list", {"spec.outputs": [None]}, "spec.outputs[0]", "must be of type object"),
    Bad("fraction-of-cpu", {"spec.topology.resources": {"cpu": 0.5}}, "spec.topology.resources.cpu", "e.g. 8, 500m"),
    # Values out of bounds.
    Bad("method-in-lower-case", {"spec.training.method": "lora"}, "spec.training.method", "write LoRA"),
    Bad("unknown-method", {"spec.training.method": "Hypernetwork"}, "spec.training.method", 'values: "LoRA", "Dream'),
    Bad("unknown-optimizer", {"spec.training.optimizer": "AdamW"}, "spec.training.optimizer", "write adamw"),
    Bad("unknown-format", {"spec.outputs": [{"format": "ckpt", "to": "o"}]}, "spec.outputs[0].format", "Unsupported"),
    Bad("batch-of-zero", {"spec.training.batchSize": 0}, "spec.training.batchSize", "greater than or equal to 1"),
    Bad("no-nodes", {"spec.topology.nodes": 0}, "spec.topology.nodes", "should be greater than or equal to 1"),
    Bad("negative-steps", {"spec.training.steps": -1}, "spec.training.steps", "should be greater than or equal to 1"),
    Bad("rate-of-zero", {"spec.training.learningRate": 0}, "spec.training.learningRate", "should be greater than 0"),
    Bad("rate-without-minus", {"spec.training.learningRate": 1e4}, "spec.training.learningRate", "or equal to 10"),
    Bad("beta-of-one", {"spec.training.adamBeta1": 1}, "spec.training.adamBeta1", "should be less than 1"),
    Bad("resolution", {"spec.training.resolution": 500}, "spec.training.resolution", "write 496 or 504"),
    Bad("empty-base", {"spec.model.base": ""}, "spec.model.base", "should be at least 1 chars long"),
    Bad("long-base", {"spec.model.base": "x" * 1025}, "spec.model.base", "may not be more than 1024"),
    Bad("no-modules", {"spec.training.lora.targetModules": []}, "spec.training.lora.targetModules", "at least 1 items"),
    Bad(
        "too-many-outputs",
        {"spec.outputs": [{"format": "webui", "to": str(number)} for number in range(9)]},
        "spec.outputs",
        "must have at most 8 items",
    ),
    # Rules about one text.
    Bad("queue-name", {"spec.queueName": "My Queue"}, "spec.queueName", "lower-case letters"),
    Bad("manager", {"spec.managedBy": "kueue"}, "spec.managedBy", "write its domain and name"),
    Bad("priority-class", {"spec.priorityClassName": "High_"}, "spec.priorityClassName", "lower-case letters"),
    Bad("secret-name", {"spec.secrets": [{"name": "HF_TOKEN"}]}, "spec.secrets[0].name", "lower-case letters"),
    Bad(
        "claim-name",
        {"spec.checkpoint.storage.persistentVolumeClaim": {"claimName": "/mnt"}},
        "spec.checkpoint.storage.persistentVolumeClaim.claimName",
        "lower-case letters",
    ),
    Bad("base-is-a-page", {"spec.model.base": "https://example.com/a/b"}, "spec.model.base", "write its hub id"),
    Bad("set-is-a-page", {"spec.dataset.source": "http://example.com/a"}, "spec.dataset.source", "write its hub id"),
    Bad("preset", {"spec.training.memoryPreset": "16 GB"}, "spec.training.memoryPreset", "write auto, cpu or"),
    Bad("duration", {"spec.recovery.hangTimeout": "10 minutes"}, "spec.recovery.hangTimeout", "e.g. 90s, 10m or 1h30m"),
    Bad("no-time", {"spec.recovery.hangTimeout": "0s"}, "spec.recovery.hangTimeout", "e.g. 90s, 10m or 1h30m"),
    Bad("stale", {"spec.checkpoint.maxStale": "never"}, "spec.checkpoint.maxStale", "e.g. 90s, 10m or 1h30m"),
    Bad("best-of-nothing", {"spec.checkpoint.keepBest": True}, "spec.checkpoint.keepBest", "add training.validation"),
    Bad("shrink-no-unit", {"spec.recovery.shrinkAfter": "30"}, "spec.recovery.shrinkAfter", "write e.g. 90s"),
    Bad("no-unit", {"spec.recovery.spot.fallbackAfter": "30"}, "spec.recovery.spot.fallbackAfter", "write e.g. 90s"),
    Bad(
        "relative-path",
        {"spec.checkpoint.storage.hostPath": {"path": "checkpoints"}},
        "spec.checkpoint.storage.hostPath.path",
        "write it from the root on",
    ),
    Bad(
        "path-upwards",
        {"spec.checkpoint.storage.nfs": {"server": "nfs", "path": "/exports/.."}},
        "spec.checkpoint.storage.nfs.path",
        "without '..'",
    ),
    Bad(
        "unknown-scheme",
        {"spec.outputs": [{"format": "webui", "to": "ftp://host/x"}]},
        "spec.outputs[0].to",
        "write a folder",
    ),
    Bad("hub-without-owner", {"spec.outputs": [{"format": "webui", "to": "hub://x"}]}, "spec.outputs[0].to", "hub://o"),
    Bad(
        "two-words-for-a-token",
        {"spec.training.textualInversion.placeholderToken": "cat toy"},
        "spec.training.textualInversion.placeholderToken",
        "write one token",
        base="textual-inversion",
    ),
    # Rules about fields that contradict or need each other.
    Bad("no-method", {"spec.training": {"steps": 5}}, "spec.training.method", "write e.g. method: LoRA"),
    Bad("method-and-script", {"spec.training.script": {"path": "/x.py"}}, "spec.training.script", "leave one of them"),
    Bad("no-length", {"spec.training.steps": GONE}, "spec.training.steps", "write e.g. steps: 1000, or epochs: 10"),
    Bad("steps-and-epochs", {"spec.training.epochs": 2}, "spec.training.epochs", "leave one of them out"),
    Bad(
        "only-warm-up",
        {"spec.training.lrWarmupSteps": 200, "spec.training.lrScheduler": "linear"},
        "spec.training.lrWarmupSteps",
        "write fewer than steps",
    ),
    Bad(
        "constant-warm-up",
        {"spec.training.lrWarmupSteps": 10},
        "spec.training.lrWarmupSteps",
        "write lrScheduler: constant_with_warmup",
    ),
    Bad(
        "lora-for-full", {"spec.training.method": "Full", "spec.training.lora": {}}, "spec.training.lora", "leave lora"
    ),
    Bad("lora-for-script", {"spec.training.lora": {"rank": 4}}, "spec.training.lora", "leave lora", base="script"),
    Bad(
        "dreambooth-for-lora",
        {"spec.training.dreambooth": {"instancePrompt": "a dog"}},
        "spec.training.dreambooth",
        "write method: DreamBooth",
    ),
    Bad(
        "dreambooth-without-prompt",
        {"spec.training.method": "DreamBoothLoRA"},
        "spec.training.dreambooth",
        "write e.g. dreambooth: {instancePrompt",
    ),
    Bad(
        "class-images-without-class",
        {"spec.training.dreambooth.numClassImages": 300},
        "spec.training.dreambooth.classPrompt",
        "write e.g. classPrompt",
        base="dreambooth",
    ),
    Bad(
        "inversion-for-lora",
        {"spec.training.textualInversion": {"placeholderToken": "<x>", "initializerToken": "toy"}},
        "spec.training.textualInversion",
        "leave textualInversion out",
    ),
    Bad(
        "inversion-without-token",
        {"spec.training.method": "TextualInversion"},
        "spec.training.textualInversion",
        "write e.g. textualInversion: {placeholderToken",
    ),
    Bad(
        "token-from-itself",
        {"spec.training.textualInversion.initializerToken": "<cat-toy>"},
        "spec.training.textualInversion.initializerToken",
        "write a word that the text encoder knows",
        base="textual-inversion",
    ),
    Bad("controlnet-for-lora", {"spec.training.controlnet": {}}, "spec.training.controlnet", "leave controlnet out"),
    Bad(
        "controlnet-without-column",
        {"spec.dataset.columns": GONE},
        "spec.dataset.columns.conditioning",
        "write e.g. columns: {conditioning:",
        base="controlnet",
    ),
    Bad(
        "streamed-crops", {"spec.dataset.streaming": True}, "spec.dataset.streaming", "write training.centerCrop: true"
    ),
    Bad("streamed-script", {"spec.dataset.streaming": True}, "spec.dataset.streaming", "by its args", base="script"),
    Bad("one-column", {"spec.dataset.columns": {"caption": "image"}}, "spec.dataset.columns.caption", "with the texts"),
    Bad(
        "condition-is-image",
        {"spec.dataset.columns": {"conditioning": "image"}},
        "spec.dataset.columns.conditioning",
        "with the conditioning images",
    ),
    Bad(
        "empty-timestep-range",
        {"spec.training.timestepBias": {"strategy": "range", "begin": 600, "end": 200}},
        "spec.training.timestepBias.end",
        "begin: 200 and end: 600",
    ),
    Bad("nothing-to-validate", {"spec.training.validation": {"steps": 5}}, "spec.training.validation.prompts", "write"),
    Bad(
        "validated-on-training-set",
        {"spec.training.validation": {"split": "train"}},
        "spec.training.validation.split",
        "write the name of a held-out split",
    ),
    Bad(
        "validation-of-script",
        {"spec.training.validation": {"prompts": ["a dog"]}},
        "spec.training.validation",
        "tell the script by its args",
        base="script",
    ),
    Bad(
        "half-precision-on-cpu",
        {"spec.topology.accelerator": "cpu", "spec.training.precision": "fp16"},
        "spec.training.precision",
        "write bf16 or fp32",
    ),
    Bad(
        "8-bit-on-cpu",
        {"spec.topology.accelerator": "cpu", "spec.training.optimizer": "adamw8bit"},
        "spec.training.optimizer",
        "write adamw or adafactor",
    ),
    Bad("cpu-preset-on-gpu", {"spec.training.memoryPreset": "cpu"}, "spec.training.memoryPreset", "write auto"),
    Bad("ccl-on-gpu", {"spec.topology.cpu": {"backend": "ccl"}}, "spec.topology.cpu.backend", "write accelerator: cpu"),
    Bad("no-minimum", {"spec.topology.maxNodes": 4}, "spec.topology.minNodes", "write both, or nodes"),
    Bad("no-maximum", {"spec.topology.minNodes": 4}, "spec.topology.maxNodes", "write both, or nodes"),
    Bad(
        "fixed-and-range",
        {"spec.topology": {"nodes": 2, "minNodes": 1, "maxNodes": 4}},
        "spec.topology.nodes",
        "write nodes for a fixed number",
    ),
    Bad("range-backwards", {"spec.topology": {"minNodes": 4, "maxNodes": 2}}, "spec.topology.maxNodes", "at least min"),
    Bad(
        "other-number-of-gpus",
        {"spec.topology": {"processesPerNode": 2, "resources": {"nvidia.com/gpu": 4}}},
        "spec.topology.resources",
        "write processesPerNode",
    ),
    Bad(
        "gpus-on-cpu",
        {"spec.topology": {"accelerator": "cpu", "resources": {"nvidia.com/gpu": "1"}}},
        "spec.topology.resources",
        "is none on cpu",
    ),
    Bad(
        "misspelt-resource", {"spec.topology.resources": {"memroy": "1Gi"}}, "spec.topology.resources", "write cpu, mem"
    ),
    Bad("no-quantity", {"spec.topology.resources": {"memory": "32GB"}}, "spec.topology.resources", "memory: 32Gi"),
    Bad("negative-cpu", {"spec.topology.resources": {"cpu": -1}}, "spec.topology.resources", "memory: 32Gi"),
    Bad("no-volume", {"spec.checkpoint.storage": {}}, "spec.checkpoint.storage", "write e.g. persistentVolumeClaim"),
    Bad(
        "two-volumes",
        {"spec.checkpoint.storage": {"hostPath": {"path": "/a"}, "nfs": {"server": "nfs", "path": "/a"}}},
        "spec.checkpoint.storage",
        "exactly one of",
    ),
    Bad(
        "bucket-is-a-page",
        {"spec.checkpoint.storage": {"bucket": {"url": "https://s3.example.com/models"}}},
        "spec.checkpoint.storage.bucket.url",
        "e.g. s3://models/checkpoints",
    ),
    Bad(
        "endpoint-without-scheme",
        {"spec.checkpoint.storage": {"bucket": {"url": "s3://models", "endpoint": "minio:9000"}}},
        "spec.checkpoint.storage.bucket.endpoint",
        "write e.g. https://minio.example.com",
    ),
    Bad(
        "endpoint-for-none",
        {"spec.checkpoint.storage": {"bucket": {"url": "gs://models", "endpoint": "https://minio.example.com"}}},
        "spec.checkpoint.storage.bucket.endpoint",
        "leave it out",
    ),
    Bad(
        "scratch-for-slices",
        {"spec.training.method": "Full", "spec.training.sharding": "full", "spec.checkpoint.scratch": {}},
        "spec.checkpoint.scratch",
        "leave scratch out",
    ),
    Bad(
        "scratch-size",
        {"spec.checkpoint.scratch": {"sizeLimit": "50GB"}},
        "spec.checkpoint.scratch.sizeLimit",
        "write e.g. 50Gi",
    ),
    Bad(
        "sharded-adafactor",
        {"spec.training.method": "Full", "spec.training.sharding": "full", "spec.training.optimizer": "adafactor"},
        "spec.training.sharding",
        "write optimizer: adamw",
    ),
    Bad(
        "sharded-lora",
        {"spec.training.sharding": "full"},
        "spec.training.sharding",
        "sharding is for Full, DreamBooth, ControlNet",
    ),
    Bad(
        "offload-of-no-slices",
        {"spec.training.method": "Full", "spec.training.offload": "cpu"},
        "spec.training.offload",
        "write sharding: full",
    ),
    Bad(
        "offload-on-cpu",
        {
            "spec.topology.accelerator": "cpu",
            "spec.training.method": "Full",
            "spec.training.sharding": "full",
            "spec.training.offload": "cpu",
        },
        "spec.training.offload",
        "leave offload out",
    ),
    Bad(
        "two-intervals",
        {"spec.checkpoint.interval": {"steps": 100, "seconds": 60}},
        "spec.checkpoint.interval.seconds",
        "leave one of them out",
    ),
    Bad(
        "outputs-overwrite",
        {"spec.outputs": [{"format": "webui", "to": "out"}, {"format": "kohya", "to": "out"}]},
        "spec.outputs",
        "write another to for each",
    ),
    Bad(
        "kohya-of-full",
        {"spec.training.method": "Full", "spec.outputs": [{"format": "kohya", "to": "out"}]},
        "spec.outputs",
        "write diffusers, webui or openvino",
    ),
    Bad("secret-twice", {"spec.secrets": [{"name": "a"}, {"name": "a"}]}, "spec.secrets", "write each Secret once"),
)
