"""Invalid manifests whose fields exclude or require each other: one for each rule, with its message."""

from __future__ import annotations

from tests.api.bad_manifest import BadManifest
from tests.api.manifests import REMOVED

BAD_COMBINATIONS = (
    # Rules about fields that exclude or require each other.
    BadManifest("no-method", {"spec.training": {"steps": 5}}, "spec.training.method", "write e.g. method: LoRA"),
    BadManifest(
        "no-length", {"spec.training.steps": REMOVED}, "spec.training.steps", "write e.g. steps: 1000 or epochs: 10"
    ),
    BadManifest("steps-and-epochs", {"spec.training.epochs": 2}, "spec.training.epochs", "leave steps out, or"),
    BadManifest(
        "rate-of-frozen-text-encoder",
        {"spec.training.textEncoderLearningRate": 1e-5},
        "spec.training.textEncoderLearningRate",
        "needs a trained text encoder",
    ),
    BadManifest(
        "text-rate-with-prodigy",
        {
            "spec.training.textEncoderLearningRate": 1e-5,
            "spec.training.lora": {"trainTextEncoder": True},
            "spec.training.optimizer": "prodigy",
        },
        "spec.training.textEncoderLearningRate",
        "prodigy finds one step size",
    ),
    BadManifest(
        "cycles-of-another-schedule",
        {"spec.training.lrNumCycles": 3, "spec.training.lrScheduler": "cosine"},
        "spec.training.lrNumCycles",
        "lrNumCycles applies to lrScheduler cosine_with_restarts only",
    ),
    BadManifest(
        "power-of-another-schedule",
        {"spec.training.lrPower": 2.0},
        "spec.training.lrPower",
        "lrPower applies to lrScheduler polynomial only",
    ),
    BadManifest(
        "only-warm-up",
        {"spec.training.lrWarmupSteps": 200, "spec.training.lrScheduler": "linear"},
        "spec.training.lrWarmupSteps",
        "write a number below steps",
    ),
    BadManifest(
        "constant-warm-up",
        {"spec.training.lrWarmupSteps": 10},
        "spec.training.lrWarmupSteps",
        "write lrScheduler: constant_with_warmup",
    ),
    BadManifest(
        "lora-for-full", {"spec.training.method": "Full", "spec.training.lora": {}}, "spec.training.lora", "leave lora"
    ),
    BadManifest(
        "dreambooth-for-lora",
        {"spec.training.dreambooth": {"instancePrompt": "a dog"}},
        "spec.training.dreambooth",
        "write method: DreamBooth",
    ),
    BadManifest(
        "dreambooth-without-prompt",
        {"spec.training.method": "DreamBoothLoRA"},
        "spec.training.dreambooth",
        "write e.g. dreambooth: {instancePrompt",
    ),
    BadManifest(
        "class-images-without-class",
        {"spec.training.dreambooth.numClassImages": 300},
        "spec.training.dreambooth.classPrompt",
        "write e.g. classPrompt",
        base="dreambooth",
    ),
    BadManifest(
        "own-class-images-without-class",
        {"spec.training.dreambooth.classImages": "/data/dogs"},
        "spec.training.dreambooth.classPrompt",
        "write e.g. classPrompt",
        base="dreambooth",
    ),
    BadManifest(
        "class-images-are-a-page",
        {
            "spec.training.dreambooth.classPrompt": "a dog",
            "spec.training.dreambooth.classImages": "https://example.com/dogs",
        },
        "spec.training.dreambooth.classImages",
        "write its hub id",
        base="dreambooth",
    ),
    BadManifest(
        "additional-dataset-is-a-page",
        {"spec.dataset.additional": [{"source": "https://example.com/data"}]},
        "spec.dataset.additional[0].source",
        "write its hub id",
    ),
    BadManifest(
        "tags-of-one-prompt",
        {"spec.dataset.shuffleTags": {}},
        "spec.dataset.shuffleTags",
        "leave shuffleTags out",
        base="dreambooth",
    ),
    BadManifest(
        "conditions-without-controlnet",
        {"spec.training.validation": {"prompts": ["a dog"], "images": ["/data/edges.png"]}},
        "spec.training.validation.images",
        "leave images out",
    ),
    BadManifest(
        "fewer-conditions-than-prompts",
        {"spec.training.validation": {"prompts": ["a dog", "a cat"], "images": ["/data/edges.png"]}},
        "spec.training.validation.images",
        "write one image for each prompt",
        base="controlnet",
    ),
    BadManifest(
        "validation-steps-and-epochs",
        {"spec.training.validation": {"prompts": ["a dog"], "steps": 5, "epochs": 1}},
        "spec.training.validation.epochs",
        "leave steps out",
    ),
    BadManifest(
        "inversion-for-lora",
        {"spec.training.textualInversion": {"placeholderToken": "<x>", "initializerToken": "toy"}},
        "spec.training.textualInversion",
        "leave textualInversion out",
    ),
    BadManifest(
        "inversion-without-token",
        {"spec.training.method": "TextualInversion"},
        "spec.training.textualInversion",
        "write e.g. textualInversion: {placeholderToken",
    ),
    BadManifest(
        "token-from-itself",
        {"spec.training.textualInversion.initializerToken": "<cat-toy>"},
        "spec.training.textualInversion.initializerToken",
        "write a word that the text encoder knows",
        base="textual-inversion",
    ),
    BadManifest(
        "inversion-from-nothing",
        {"spec.training.textualInversion.initializerToken": REMOVED},
        "spec.training.textualInversion.initializerToken",
        "write a word that is close to the subject",
        base="textual-inversion",
    ),
    BadManifest(
        "embedding-and-checkpoint",
        {"spec.training.textualInversion.base": "cat.bin", "spec.checkpoint.from": {"job": "circles"}},
        "spec.training.textualInversion.base",
        "leave base out",
        base="textual-inversion",
    ),
    BadManifest(
        "lora-and-checkpoint",
        {"spec.training.lora": {"base": "lora.safetensors"}, "spec.checkpoint.from": {"job": "circles"}},
        "spec.training.lora.base",
        "leave base out",
    ),
    BadManifest(
        "from-two-places",
        {"spec.checkpoint.from": {"job": "circles", "path": "/mnt/circles"}},
        "spec.checkpoint.from",
        "write one of them",
    ),
    BadManifest(
        "from-a-page",
        {"spec.checkpoint.from": {"url": "https://example.com/circles"}},
        "spec.checkpoint.from.url",
        "write s3://, gs:// or az://",
    ),
    BadManifest(
        "from-a-sentence",
        {"spec.checkpoint.from": {"job": "my circles"}},
        "spec.checkpoint.from.job",
        "write lower-case letters",
    ),
    BadManifest(
        "controlnet-for-lora", {"spec.training.controlnet": {}}, "spec.training.controlnet", "leave controlnet out"
    ),
    BadManifest(
        "controlnet-without-column",
        {"spec.dataset.columns": REMOVED},
        "spec.dataset.columns.conditioning",
        "write e.g. columns: {conditioning:",
        base="controlnet",
    ),
    BadManifest(
        "streamed-crops", {"spec.dataset.streaming": True}, "spec.dataset.streaming", "write training.centerCrop: true"
    ),
    BadManifest(
        "one-column",
        {"spec.dataset.columns": {"caption": "image"}},
        "spec.dataset.columns.caption",
        "contains the captions",
    ),
    BadManifest(
        "condition-is-image",
        {"spec.dataset.columns": {"conditioning": "image"}},
        "spec.dataset.columns.conditioning",
        "contains the conditioning images",
    ),
    BadManifest(
        "empty-timestep-range",
        {"spec.training.timestepBias": {"strategy": "range", "begin": 600, "end": 200}},
        "spec.training.timestepBias.end",
        "begin: 200 and end: 600",
    ),
    BadManifest(
        "nothing-to-validate", {"spec.training.validation": {"steps": 5}}, "spec.training.validation.prompts", "write"
    ),
    BadManifest(
        "validated-on-training-set",
        {"spec.training.validation": {"split": "train"}},
        "spec.training.validation.split",
        "write the name of a held-out split",
    ),
    BadManifest(
        "half-precision-on-cpu",
        {"spec.topology.accelerator": "cpu", "spec.training.precision": "fp16"},
        "spec.training.precision",
        "write bf16 or fp32",
    ),
    BadManifest(
        "8-bit-on-cpu",
        {"spec.topology.accelerator": "cpu", "spec.training.optimizer": "adamw8bit"},
        "spec.training.optimizer",
        "write adamw, adafactor or prodigy",
    ),
    BadManifest(
        "efficient-attention-on-cpu",
        {"spec.topology.accelerator": "cpu", "spec.training.attention": "efficient"},
        "spec.training.attention",
        "write auto, flash or math",
    ),
    BadManifest(
        "flash-attention-in-fp32",
        {"spec.training.attention": "flash", "spec.training.precision": "fp32"},
        "spec.training.attention",
        "write attention: auto, or precision: bf16",
    ),
    BadManifest("cpu-preset-on-gpu", {"spec.training.memoryPreset": "cpu"}, "spec.training.memoryPreset", "write auto"),
    BadManifest(
        "ccl-on-gpu", {"spec.topology.cpu": {"backend": "ccl"}}, "spec.topology.cpu.backend", "write accelerator: cpu"
    ),
    BadManifest(
        "communication-cores-on-gpu",
        {"spec.topology.cpu": {"coresForCommunication": 1}},
        "spec.topology.cpu.coresForCommunication",
        "write accelerator: cpu",
    ),
    BadManifest("no-minimum", {"spec.topology.maxNodes": 4}, "spec.topology.minNodes", "write both, or write nodes"),
    BadManifest("no-maximum", {"spec.topology.minNodes": 4}, "spec.topology.maxNodes", "write both, or write nodes"),
    BadManifest(
        "fixed-and-range",
        {"spec.topology": {"nodes": 2, "minNodes": 1, "maxNodes": 4}},
        "spec.topology.nodes",
        "write nodes for a fixed number",
    ),
    BadManifest(
        "range-backwards", {"spec.topology": {"minNodes": 4, "maxNodes": 2}}, "spec.topology.maxNodes", "at least min"
    ),
    BadManifest(
        "other-number-of-gpus",
        {"spec.topology": {"processesPerNode": 2, "resources": {"nvidia.com/gpu": 4}}},
        "spec.topology.resources",
        "as processesPerNode",
    ),
    BadManifest(
        "gpus-on-cpu",
        {"spec.topology": {"accelerator": "cpu", "resources": {"nvidia.com/gpu": "1"}}},
        "spec.topology.resources",
        "none on cpu",
    ),
    BadManifest(
        "misspelt-resource", {"spec.topology.resources": {"memroy": "1Gi"}}, "spec.topology.resources", "write cpu, mem"
    ),
    BadManifest(
        "no-quantity", {"spec.topology.resources": {"memory": "32GB"}}, "spec.topology.resources", "memory: 32Gi"
    ),
    BadManifest("negative-cpu", {"spec.topology.resources": {"cpu": -1}}, "spec.topology.resources", "memory: 32Gi"),
    BadManifest("no-volume", {"spec.checkpoint.storage": {}}, "spec.checkpoint.storage", "e.g. persistentVolumeClaim"),
    BadManifest(
        "two-volumes",
        {"spec.checkpoint.storage": {"hostPath": {"path": "/a"}, "nfs": {"server": "nfs", "path": "/a"}}},
        "spec.checkpoint.storage",
        "exactly one of",
    ),
    BadManifest(
        "bucket-is-a-page",
        {"spec.checkpoint.storage": {"bucket": {"url": "https://s3.example.com/models"}}},
        "spec.checkpoint.storage.bucket.url",
        "e.g. s3://models/checkpoints",
    ),
    BadManifest(
        "endpoint-without-scheme",
        {"spec.checkpoint.storage": {"bucket": {"url": "s3://models", "endpoint": "minio:9000"}}},
        "spec.checkpoint.storage.bucket.endpoint",
        "write e.g. https://minio.example.com",
    ),
    BadManifest(
        "endpoint-for-none",
        {"spec.checkpoint.storage": {"bucket": {"url": "gs://models", "endpoint": "https://minio.example.com"}}},
        "spec.checkpoint.storage.bucket.endpoint",
        "leave endpoint out",
    ),
    BadManifest(
        "scratch-for-slices",
        {"spec.training.method": "Full", "spec.training.sharding": "full", "spec.checkpoint.scratch": {}},
        "spec.checkpoint.scratch",
        "leave scratch out",
    ),
    BadManifest(
        "scratch-size",
        {"spec.checkpoint.scratch": {"sizeLimit": "50GB"}},
        "spec.checkpoint.scratch.sizeLimit",
        "write e.g. 50Gi",
    ),
    BadManifest(
        "sharded-adafactor",
        {"spec.training.method": "Full", "spec.training.sharding": "full", "spec.training.optimizer": "adafactor"},
        "spec.training.sharding",
        "write optimizer: adamw",
    ),
    BadManifest(
        "sharded-lora",
        {"spec.training.sharding": "full"},
        "spec.training.sharding",
        "only DreamBooth, Full and ControlNet support sharding",
    ),
    BadManifest(
        "offload-of-no-slices",
        {"spec.training.method": "Full", "spec.training.offload": "cpu"},
        "spec.training.offload",
        "write sharding: full",
    ),
    BadManifest(
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
    BadManifest(
        "two-intervals",
        {"spec.checkpoint.interval": {"steps": 100, "seconds": 60}},
        "spec.checkpoint.interval.seconds",
        "leave steps out, leave seconds out",
    ),
    BadManifest(
        "outputs-overwrite",
        {"spec.outputs": [{"format": "webui", "to": "out"}, {"format": "kohya", "to": "out"}]},
        "spec.outputs",
        "write a different to for each",
    ),
    BadManifest(
        "kohya-of-full",
        {"spec.training.method": "Full", "spec.outputs": [{"format": "kohya", "to": "out"}]},
        "spec.outputs",
        "write format: diffusers",
    ),
    BadManifest(
        "layout-of-lora",
        {"spec.outputs": [{"format": "kohya", "to": "out", "layout": "single-file"}]},
        "spec.outputs[0].layout",
        "write format: merged",
    ),
    BadManifest(
        "openvino-of-controlnet",
        {
            "spec.training.method": "ControlNet",
            "spec.dataset.columns.conditioning": "edges",
            "spec.outputs": [{"format": "openvino", "to": "out"}],
        },
        "spec.outputs",
        "write format: diffusers",
    ),
    BadManifest(
        "bf16-of-openvino",
        {"spec.outputs": [{"format": "openvino", "to": "out", "precision": "bf16"}]},
        "spec.outputs[0].precision",
        "write precision: fp16",
    ),
    BadManifest(
        "quantization-of-kohya",
        {"spec.outputs": [{"format": "kohya", "to": "out", "quantization": "int8"}]},
        "spec.outputs[0].quantization",
        "write format: openvino",
    ),
    BadManifest(
        "strength-of-full",
        {"spec.training.method": "Full", "spec.outputs": [{"format": "openvino", "to": "out", "strength": 0.5}]},
        "spec.outputs",
        "leave strength and adapters out",
    ),
    BadManifest(
        "strength-of-lora",
        {"spec.outputs": [{"format": "kohya", "to": "out", "strength": 0.5}]},
        "spec.outputs[0].strength",
        "write format: merged",
    ),
    BadManifest(
        "adapters-of-lora",
        {"spec.outputs": [{"format": "kohya", "to": "out", "adapters": [{"source": "me/lora"}]}]},
        "spec.outputs[0].adapters",
        "write format: merged",
    ),
    BadManifest(
        "full-of-kohya",
        {"spec.outputs": [{"format": "kohya", "to": "out", "full": True}]},
        "spec.outputs[0].full",
        "write format: diffusers",
    ),
    BadManifest(
        "ckpt-of-folder",
        {"spec.training.method": "Full", "spec.outputs": [{"format": "diffusers", "to": "out", "container": "ckpt"}]},
        "spec.outputs[0].container",
        "write format: single-file",
    ),
    BadManifest(
        "rank-of-full",
        {"spec.training.method": "Full", "spec.outputs": [{"format": "diffusers", "to": "out", "rank": 4}]},
        "spec.outputs",
        "leave rank out",
    ),
    BadManifest(
        "ckpt-of-lora",
        {"spec.outputs": [{"format": "webui", "to": "out", "container": "ckpt"}]},
        "spec.outputs",
        "leave container out",
    ),
    BadManifest(
        "average-of-none",
        {"spec.outputs": [{"format": "diffusers", "to": "out", "ema": True}]},
        "spec.outputs",
        "write training.ema: true",
    ),
    BadManifest(
        "secret-twice", {"spec.secrets": [{"name": "a"}, {"name": "a"}]}, "spec.secrets", "write each Secret once"
    ),
)
