"""Valid manifests for the tests, and a function that patches one."""

from __future__ import annotations

import copy
from enum import Enum
from typing import Any

from finetune_operator.api.job import API_VERSION, KIND

Document = dict[str, Any]


class _Removed(Enum):
    """Type of REMOVED. Its text is the same in every process: it is part of test names."""

    REMOVED = "removed"


REMOVED = _Removed.REMOVED
"""Value in a patch that removes the field."""


def patched(document: Document, patch: dict[str, Any]) -> Document:
    """Return a copy with fields set by their dotted paths."""
    document = copy.deepcopy(document)
    for path, value in patch.items():
        *parents, name = path.split(".")
        place = document
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is REMOVED:
            place.pop(name)
        else:
            place[name] = copy.deepcopy(value)
    return document


SMALLEST: Document = {
    "apiVersion": API_VERSION,
    "kind": KIND,
    "metadata": {"name": "circles"},
    "spec": {
        "model": {"base": "runwayml/stable-diffusion-v1-5"},
        "dataset": {"source": "lambdalabs/naruto-blip-captions"},
        "training": {"method": "LoRA", "steps": 200},
    },
}

DREAMBOOTH = patched(
    SMALLEST,
    {"spec.training.method": "DreamBooth", "spec.training.dreambooth": {"instancePrompt": "a photo of sks dog"}},
)
TEXTUAL_INVERSION = patched(
    SMALLEST,
    {
        "spec.training.method": "TextualInversion",
        "spec.training.textualInversion": {"placeholderToken": "<cat-toy>", "initializerToken": "toy"},
    },
)
CONTROLNET = patched(
    SMALLEST,
    {
        "spec.training.method": "ControlNet",
        "spec.training.controlnet": {"conditioningDropout": 0.1},
        "spec.dataset.columns": {"conditioning": "edges"},
    },
)
SCRIPT = patched(
    SMALLEST,
    {
        "spec.training": {
            "script": {"path": "/scripts/train_text_to_image_lora.py", "args": ["--max_train_steps=200", ""]}
        }
    },
)
FULL = patched(
    SMALLEST,
    {
        "metadata.labels": {"team": "pictures"},
        "spec.model": {
            "base": "s3://models/sdxl.safetensors",
            "revision": "fp16",
            "variant": "fp16",
            "config": "a/xl",
            "vae": "a/vae",
        },
        "spec.dataset": {
            "source": "/data/circles",
            "split": "train",
            "columns": {"image": "picture", "caption": "words", "conditioning": "edges"},
            "revision": "v1.0",
            "maxSamples": 1000,
            "maxBroken": 10,
            "streaming": True,
            "repeats": 2,
            "weight": 0.5,
            "additional": [
                {"source": "owner/rings", "revision": "v2", "split": "all", "repeats": 10, "weight": 2},
                {"source": "s3://pictures/discs"},
            ],
        },
        "spec.training": {
            "method": "DreamBoothLoRA",
            "epochs": 3,
            "batchSize": 4,
            "gradientAccumulation": 2,
            "learningRate": 2e-5,
            "lrScheduler": "cosine_with_restarts",
            "lrWarmupSteps": 10,
            "lrNumCycles": 3,
            "longCaptions": "chunk",
            "clipSkip": 1,
            "adamBeta1": 0.8,
            "adamBeta2": 0.99,
            "adamWeightDecay": 0,
            "adamEpsilon": 1e-6,
            "maxGradNorm": 0,
            "precision": "bf16",
            "weightPrecision": "fp32",
            "gradientCheckpointing": True,
            "attention": "efficient",
            "compile": "on",
            "cudaGraphs": "auto",
            "resolution": 1024,
            "centerCrop": True,
            "randomFlip": True,
            "aspectBuckets": True,
            "optimizer": "adamw8bit",
            "sharding": "none",
            "offload": "none",
            "exchangePrecision": "bf16",
            "snrGamma": 5,
            "noiseOffset": 0.05,
            "inputPerturbation": 0.1,
            "captionDropout": 0.1,
            "timestepBias": {"strategy": "range", "multiplier": 3, "portion": 0.5, "begin": 200, "end": 600},
            "ema": True,
            "seed": 7,
            "memoryPreset": "24GB",
            "trackers": ["tensorboard", "wandb"],
            "lora": {
                "rank": 16,
                "alpha": 32,
                "dropout": 0.1,
                "targetModules": ["to_q", "to_v"],
                "useDora": True,
                "trainTextEncoder": True,
                "base": "owner/lora",
            },
            "dreambooth": {
                "instancePrompt": "a photo of sks dog",
                "classPrompt": "a photo of a dog",
                "classImages": "/data/dogs",
                "numClassImages": 200,
                "priorLossWeight": 0.5,
                "trainTextEncoder": True,
            },
            "validation": {
                "prompts": ["a photo of sks dog in Paris"],
                "split": "validation",
                "steps": 50,
                "numInferenceSteps": 30,
                "guidanceScale": 5,
                "seed": 1,
            },
        },
        "spec.topology": {
            "accelerator": "gpu",
            "minNodes": 2,
            "maxNodes": 8,
            "processesPerNode": 4,
            "resources": {"cpu": "7500m", "memory": "64Gi", "rdma/hca": 1},
            "pack": "rack",
            "gpuClaimTemplateName": "four-gpus",
        },
        "spec.checkpoint": {
            "storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}},
            "interval": {"seconds": 300},
            "keep": 5,
            "keepEvery": 1000,
            "keepBest": True,
            "maxStale": "1h",
            "scratch": {"sizeLimit": "50Gi"},
        },
        "spec.recovery": {
            "maxFailures": 0,
            "manualRetries": 1,
            "spot": {"fallbackAfter": "30m"},
            "shrinkAfter": "3m",
            "hangTimeout": "1h30m",
            "noticeSeconds": 30,
            "maxMemory": "128Gi",
        },
        "spec.outputs": [
            {"format": "diffusers", "to": "/checkpoints/out"},
            {"format": "kohya", "to": "s3://models/dog"},
            {"format": "merged", "to": "hub://owner/dog"},
        ],
        "spec.suspend": True,
        "spec.scheduling": "none",
        "spec.queueName": "pictures",
        "spec.priorityClassName": "spot",
        "spec.activeDeadlineSeconds": 86400,
        "spec.ttlSecondsAfterFinished": 3600,
        "spec.secrets": [{"name": "hub-token"}],
        "spec.managedBy": "finetune-operator.io/finetunejob-controller",
        "spec.podTemplate": {"spec": {"nodeSelector": {"zone": "a"}, "tolerations": []}},
    },
)
IN_IMAGE = patched(
    SMALLEST,
    {
        "spec.model": {
            "base": "/finetune/model/sdxl",
            "image": {"reference": "registry.example.com:5000/models/sdxl:1.0", "pullPolicy": "IfNotPresent"},
        }
    },
)
CPU = {
    "backend": "ccl",
    "ipex": "on",
    "ranksPer": "socket",
    "coresForCommunication": 2,
    "allocator": "jemalloc",
}
CPU_NODES = patched(
    TEXTUAL_INVERSION,
    {
        "spec.topology": {"accelerator": "cpu", "nodes": 4, "processesPerNode": 4, "cpu": CPU},
        "spec.training.memoryPreset": "cpu",
        "spec.checkpoint.storage.nfs": {"server": "nfs.example.com", "path": "/exports/checkpoints"},
    },
)
HOST_PATH = patched(SMALLEST, {"spec.checkpoint": {"storage": {"hostPath": {"path": "/mnt/checkpoints"}}}})
BUCKET = patched(
    SMALLEST,
    {"spec.checkpoint": {"storage": {"bucket": {"url": "s3://models/runs", "endpoint": "https://s3.example.com"}}}},
)

GOOD: dict[str, Document] = {
    "smallest": SMALLEST,
    "dreambooth": DREAMBOOTH,
    "textual-inversion": TEXTUAL_INVERSION,
    "controlnet": CONTROLNET,
    "script": SCRIPT,
    "full": FULL,
    "cpu-nodes": CPU_NODES,
    "in-image": IN_IMAGE,
    "bucket": BUCKET,
    "host-path": HOST_PATH,
    "longest-name": patched(SMALLEST, {"metadata.name": "c" * 51}),
    "nulls": patched(SMALLEST, {"spec.topology": None, "spec.outputs": None, "spec.training.epochs": None}),
}
