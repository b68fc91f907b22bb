"""The advice in each message, and the edits that follow it. `test_advice` applies them.

A row maps parts of a message to edits of the refused manifest. Together the parts must cover the whole advice: a value
or field that a message recommends and no edit tries fails the test.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.api.bad_scripts import METHOD_SETTINGS
from tests.api.manifests import GOOD, REMOVED
from tests.api.output_advice import OUTPUT_ADVICE
from tests.api.pod_advice import POD_ADVICE

Edit = dict[str, Any]
Advice = dict[str, Edit]
"""Part of a message -> the edit that follows it."""


def each(path: str, values: Iterable[str]) -> Advice:
    """Return the advice to write one of several values."""
    return {value: {path: value} for value in values}


def durations(path: str) -> Advice:
    return each(path, ("90s", "10m", "1h30m"))


def names(path: str, value: Any = "my-name.1") -> Advice:
    return {"lower-case letters, digits, '-' and '.'": {path: value}}


def removed(*fields: str) -> Edit:
    return dict.fromkeys(fields, REMOVED)


T = "spec.training"
STORAGE = "spec.checkpoint.storage"
RESOURCES = "spec.topology.resources"
CLAIM = {"claimName": "checkpoints"}
DREAMBOOTH = {"instancePrompt": "a photo of sks dog"}
INVERSION = {"placeholderToken": "<cat-toy>", "initializerToken": "toy"}
HOST_NAME = "lower-case letters, digits and '-', with a letter first and no '-' at the end"
CONDITIONED = {"spec.dataset.columns": {"conditioning": "conditioning_image"}}
METHODS: dict[str, Edit] = {
    "LoRA": {f"{T}.method": "LoRA"},
    "DreamBooth": {f"{T}.method": "DreamBooth", f"{T}.dreambooth": DREAMBOOTH},
    "DreamBoothLoRA": {f"{T}.method": "DreamBoothLoRA", f"{T}.dreambooth": DREAMBOOTH},
    "TextualInversion": {f"{T}.method": "TextualInversion", f"{T}.textualInversion": INVERSION},
    "Full": {f"{T}.method": "Full"},
    "ControlNet": {f"{T}.method": "ControlNet", **CONDITIONED},
}
"""The edit that selects each method, with the settings that it requires."""
LORA_FOR_SCRIPT = {f"{T}.method": "LoRA", f"{T}.steps": 1000, f"{T}.script": REMOVED}
STORAGES: Advice = {
    "persistentVolumeClaim": {STORAGE: {"persistentVolumeClaim": CLAIM}},
    "hostPath": {STORAGE: {"hostPath": {"path": "/mnt/checkpoints"}}},
    "nfs": {STORAGE: {"nfs": {"server": "nfs", "path": "/exports"}}},
    "bucket": {STORAGE: {"bucket": {"url": "s3://models/checkpoints"}}},
}
RANGE: Edit = {"spec.topology": {"minNodes": 2, "maxNodes": 4}}
FIXED_NODES: Edit = {"spec.topology": {"nodes": 4}}
QUANTITIES: Advice = {
    "cpu: 8": {RESOURCES: {"cpu": 8}},
    "cpu: 500m": {RESOURCES: {"cpu": "500m"}},
    "memory: 32Gi": {RESOURCES: {"memory": "32Gi"}},
}
LOCATIONS = {"a folder": "/data/circles", "an s3:// URL": "s3://bucket/folder"}
OUTPUT_FOLDER: Advice = {
    "a folder": {"spec.outputs": [{"format": "webui", "to": "lora"}]},
    "to: lora": {"spec.outputs": [{"format": "webui", "to": "lora"}]},
    "a folder of a bucket, e.g. s3://models/lora": {"spec.outputs": [{"format": "webui", "to": "s3://models/lora"}]},
    "a repository, e.g. hub://owner/name": {"spec.outputs": [{"format": "webui", "to": "hub://owner/name"}]},
}
DIFFUSERS: Advice = {"format: diffusers": {"spec.outputs": [{"format": "diffusers", "to": "out"}]}}

ADVICE: dict[str, Advice] = {
    "other-kind": {"kind: FineTuneJob": {"kind": "FineTuneJob"}},
    "no-kind": {"kind: FineTuneJob": {"kind": "FineTuneJob"}},
    "other-version": {
        "apiVersion: finetune-operator.io/v1alpha1": {"apiVersion": "finetune-operator.io/v1alpha1"},
    },
    "no-name": {"name": {"metadata.name": "circles"}},
    "no-metadata": {"metadata": {"metadata": {"name": "circles"}}},
    "namespace-is-a-path": {"'^[a-z0-9]([-a-z0-9]*[a-z0-9])?$'": {"metadata.namespace": "team-a"}},
    "name-in-capitals": {HOST_NAME: {"metadata.name": "circles-1"}},
    "name-with-dot": {HOST_NAME: {"metadata.name": "circles-1"}},
    "name-begins-with-digit": {HOST_NAME: {"metadata.name": "circles-1"}},
    "name-too-long": {"a name of at most 51 characters": {"metadata.name": "c" * 51}},
    "no-spec": {"spec": {"spec": GOOD["smallest"]["spec"]}},
    "no-model": {"model": {"spec.model": {"base": "a/b"}}},
    "no-dataset": {"dataset": {"spec.dataset": {"source": "a/b"}}},
    "no-output-place": {"to": {"spec.outputs": [{"format": "webui", "to": "out"}]}},
    "misspelt": {"learningRate": {f"{T}.learningrate": REMOVED, f"{T}.learningRate": 1}},
    "snake-case": {"batchSize": {f"{T}.batch_size": REMOVED, f"{T}.batchSize": 2}},
    "flag-of-a-script": {"spec.training.steps": {f"{T}.max_train_steps": REMOVED, f"{T}.steps": 2}},
    "misplaced": {
        "spec.topology.processesPerNode": {"spec.processesPerNode": REMOVED, "spec.topology.processesPerNode": 2},
    },
    "invented": {
        **{
            name: {"spec.model.flavour": REMOVED, f"spec.model.{name}": "a/b"}
            for name in ("base", "revision", "variant", "config", "vae")
        },
        "image": {"spec.model": {"base": "/finetune/model", "image": {"reference": "a.example.com/b"}}},
    },
    "invented-at-top": {
        name: {"template": REMOVED, name: GOOD["smallest"].get(name, {})}
        for name in ("apiVersion", "kind", "metadata", "spec", "status")
    },
    "quoted-number": {"200 without quotes": {f"{T}.steps": 200}},
    "text-for-number": {"an integer": {f"{T}.steps": 1}, "100": {f"{T}.steps": 100}},
    "text-for-rate": {"a number": {f"{T}.learningRate": 1}, "0.0001": {f"{T}.learningRate": 0.0001}},
    "fraction": {"an integer": {f"{T}.steps": 1}, "100": {f"{T}.steps": 100}},
    "quoted-rate": {"0.0001 without quotes": {f"{T}.learningRate": 0.0001}},
    "rate-of-yaml-1.1": {"1.0e-4": {f"{T}.learningRate": 1.0e-4}},
    "quoted-bool": {"true without quotes": {f"{T}.ema": True}},
    "number-for-bool": {"true": {"spec.suspend": True}, "false": {"spec.suspend": False}},
    "number-for-text": {"a string, in quotes if it looks like a number or a boolean": {"spec.model.revision": "7"}},
    "text-for-fields": {"its fields, indented below it": {"spec.model": {"base": "a/b"}}},
    "text-for-list": {"a list, with one '- ' for each item": {"spec.outputs": [{"format": "webui", "to": "out"}]}},
    "nothing-in-list": {"its fields, indented below it": {"spec.outputs": [{"format": "webui", "to": "out"}]}},
    "fraction-of-cpu": {
        "an integer": {f"{RESOURCES}.cpu": 1},
        "a string": {f"{RESOURCES}.cpu": "1"},
        "8": {f"{RESOURCES}.cpu": 8},
        "500m": {f"{RESOURCES}.cpu": "500m"},
        "32Gi": {RESOURCES: {"memory": "32Gi"}},
    },
    "method-in-lower-case": {"LoRA": METHODS["LoRA"]},
    "unknown-method": {f'"{name}"': edit for name, edit in METHODS.items()},
    "unknown-optimizer": each(f"{T}.optimizer", ["adamw"]),
    "unknown-format": {"diffusers": {"spec.outputs": [{"format": "diffusers", "to": "o"}]}},
    "batch-of-zero": {"greater than or equal to 1": {f"{T}.batchSize": 1}},
    "no-nodes": {"greater than or equal to 1": {"spec.topology.nodes": 1}},
    "negative-steps": {"greater than or equal to 1": {f"{T}.steps": 1}},
    "rate-of-zero": {"greater than 0": {f"{T}.learningRate": 1e-9}},
    "rate-without-minus": {"less than or equal to 10": {f"{T}.learningRate": 10}},
    "beta-of-one": {"less than 1": {f"{T}.adamBeta1": 0.99}},
    "resolution": {"496": {f"{T}.resolution": 496}, "504": {f"{T}.resolution": 504}},
    "empty-base": {"at least 1 chars long": {"spec.model.base": "a"}},
    "long-base": {"not be more than 1024 bytes": {"spec.model.base": "x" * 1024}},
    "no-modules": {"at least 1 items": {f"{T}.lora.targetModules": ["to_q"]}},
    "too-many-outputs": {
        "at most 8 items": {"spec.outputs": [{"format": "webui", "to": str(number)} for number in range(8)]},
    },
    "queue-name": {
        "leave queueName out": removed("spec.queueName"),
    },
    "manager": {
        "its domain and name": {"spec.managedBy": "example.com/controller"},
        "kueue.x-k8s.io/multikueue": {"spec.managedBy": "kueue.x-k8s.io/multikueue"},
        "leave managedBy out": removed("spec.managedBy"),
    },
    "priority-class": names("spec.priorityClassName"),
    "secret-name": names("spec.secrets", [{"name": "my-name.1"}]),
    "output-secret-name": names(
        "spec.outputs", [{"format": "webui", "to": "s3://m/x", "secret": {"name": "my-name.1"}}]
    ),
    "claim-name": names(f"{STORAGE}.persistentVolumeClaim.claimName"),
    "base-is-a-page": {
        "its hub id": {"spec.model.base": "a/b"},
        "stabilityai/stable-diffusion-xl-base-1.0": {"spec.model.base": "stabilityai/stable-diffusion-xl-base-1.0"},
        **{words: {"spec.model.base": location} for words, location in LOCATIONS.items()},
    },
    "data-set-is-a-page": {
        "its hub id": {"spec.dataset.source": "a/b"},
        "lambdalabs/naruto-blip-captions": {"spec.dataset.source": "lambdalabs/naruto-blip-captions"},
        **{words: {"spec.dataset.source": location} for words, location in LOCATIONS.items()},
    },
    "preset": {
        "auto": {f"{T}.memoryPreset": "auto"},
        "cpu": {f"{T}.memoryPreset": "cpu", "spec.topology.accelerator": "cpu"},
        "the GPU's memory": {f"{T}.memoryPreset": "80GB"},
        "16GB": {f"{T}.memoryPreset": "16GB"},
    },
    "duration": durations("spec.recovery.hangTimeout"),
    "no-time": durations("spec.recovery.hangTimeout"),
    "stale": durations("spec.checkpoint.maxStale"),
    "best-of-nothing": {
        "training.validation.split": {f"{T}.validation": {"split": "validation"}},
        "leave keepBest out": removed("spec.checkpoint.keepBest"),
    },
    "shrink-no-unit": durations("spec.recovery.shrinkAfter"),
    "no-unit": durations("spec.recovery.spot.fallbackAfter"),
    "relative-path": {
        "it from the root and without '..'": {f"{STORAGE}.hostPath.path": "/checkpoints"},
        "/mnt/checkpoints": {f"{STORAGE}.hostPath.path": "/mnt/checkpoints"},
    },
    "path-upwards": {
        "it from the root and without '..'": {f"{STORAGE}.nfs.path": "/exports"},
        "/mnt/checkpoints": {f"{STORAGE}.nfs.path": "/mnt/checkpoints"},
    },
    "unknown-scheme": OUTPUT_FOLDER,
    "hub-without-owner": OUTPUT_FOLDER,
    "secret-of-a-folder": {
        "leave secret out": {"spec.outputs": [{"format": "webui", "to": "out"}]},
        "write a URL to to": {"spec.outputs": [{"format": "webui", "to": "s3://m/x", "secret": {"name": "a"}}]},
    },
    "two-words-for-a-token": {
        "one token": {f"{T}.textualInversion.placeholderToken": "toy2"},
        "<cat-toy>": {f"{T}.textualInversion.placeholderToken": "<cat-toy>"},
    },
    "no-method": {"method: LoRA": METHODS["LoRA"]},
    "method-and-script": {"leave script out": removed(f"{T}.script")},
    "no-length": {"steps: 1000": {f"{T}.steps": 1000}, "epochs: 10": {f"{T}.epochs": 10}},
    "steps-and-epochs": {"leave steps out": removed(f"{T}.steps"), "leave epochs out": removed(f"{T}.epochs")},
    "rate-of-frozen-text-encoder": {
        "lora.trainTextEncoder: true": {f"{T}.lora": {"trainTextEncoder": True}},
        "leave textEncoderLearningRate out": removed(f"{T}.textEncoderLearningRate"),
    },
    "text-rate-with-prodigy": {
        "leave textEncoderLearningRate out": removed(f"{T}.textEncoderLearningRate"),
        "optimizer: adamw": {f"{T}.optimizer": "adamw"},
    },
    "cycles-of-another-schedule": {
        "lrScheduler: cosine_with_restarts": {f"{T}.lrScheduler": "cosine_with_restarts"},
        "leave lrNumCycles out": removed(f"{T}.lrNumCycles"),
    },
    "power-of-another-schedule": {
        "lrScheduler: polynomial": {f"{T}.lrScheduler": "polynomial"},
        "leave lrPower out": removed(f"{T}.lrPower"),
    },
    "only-warm-up": {"a number below steps": {f"{T}.lrWarmupSteps": 199}},
    "constant-warm-up": {
        "lrScheduler: constant_with_warmup": {f"{T}.lrScheduler": "constant_with_warmup"},
        "leave lrWarmupSteps out": removed(f"{T}.lrWarmupSteps"),
    },
    "lora-for-full": {"leave lora out": removed(f"{T}.lora"), "method: LoRA": METHODS["LoRA"]},
    **{f"{field}-of-script": {f"leave {field} out": removed(f"{T}.{field}")} for field in METHOD_SETTINGS},
    "script-without-file": {
        "one of them, e.g. path: train_controlnet.py": {f"{T}.script": {"path": "train_controlnet.py"}}
    },
    "image-and-configmap": {
        "leave image out": removed(f"{T}.script.image"),
        "path instead of configMap": {f"{T}.script": {"path": "/x.py", "image": "a/b:1"}},
    },
    "script-of-no-object": names(f"{T}.script.configMap.name"),
    "elastic-script": {"nodes, and leave minNodes and maxNodes out": {"spec.topology": {"nodes": 2}}},
    "script-in-a-bucket": {name: STORAGES[name] for name in ("persistentVolumeClaim", "hostPath", "nfs")},
    "script-with-scratch": {"leave scratch out": removed("spec.checkpoint.scratch")},
    "lora-for-script": {"leave lora out": removed(f"{T}.lora"), "method: LoRA": LORA_FOR_SCRIPT},
    "dreambooth-for-lora": {
        "leave dreambooth out": removed(f"{T}.dreambooth"),
        "method: DreamBooth": {f"{T}.method": "DreamBooth"},
    },
    "dreambooth-without-prompt": {
        "dreambooth: {instancePrompt: a photo of sks dog}": {f"{T}.dreambooth": DREAMBOOTH},
    },
    "class-images-without-class": {
        "classPrompt: a photo of a dog": {f"{T}.dreambooth.classPrompt": "a photo of a dog"},
        "leave classImages, numClassImages and priorLossWeight out": removed(f"{T}.dreambooth.numClassImages"),
    },
    "own-class-images-without-class": {
        "classPrompt: a photo of a dog": {f"{T}.dreambooth.classPrompt": "a photo of a dog"},
        "leave classImages, numClassImages and priorLossWeight out": removed(f"{T}.dreambooth.classImages"),
    },
    "additional-dataset-is-a-page": {
        "its hub id": {"spec.dataset.additional": [{"source": "owner/name"}]},
        "lambdalabs/naruto-blip-captions": {"spec.dataset.additional": [{"source": "lambdalabs/naruto-blip-captions"}]},
        "a folder": {"spec.dataset.additional": [{"source": "/data/circles"}]},
        "an s3:// URL": {"spec.dataset.additional": [{"source": "s3://pictures/circles"}]},
    },
    "class-images-are-a-page": {
        "its hub id": {f"{T}.dreambooth.classImages": "owner/name"},
        "owner/photos-of-dogs": {f"{T}.dreambooth.classImages": "owner/photos-of-dogs"},
        "a folder": {f"{T}.dreambooth.classImages": "/data/dogs"},
        "an s3:// URL": {f"{T}.dreambooth.classImages": "s3://pictures/dogs"},
    },
    "tags-of-one-prompt": {"leave shuffleTags out": removed("spec.dataset.shuffleTags")},
    "conditions-without-controlnet": {"leave images out": removed(f"{T}.validation.images")},
    "fewer-conditions-than-prompts": {
        "one image for each prompt": {f"{T}.validation.images": ["/data/a.png", "/data/b.png"]},
        "leave images out": removed(f"{T}.validation.images"),
    },
    "validation-steps-and-epochs": {
        "leave steps out": removed(f"{T}.validation.steps"),
        "leave epochs out": removed(f"{T}.validation.epochs"),
    },
    "inversion-for-lora": {
        "leave textualInversion out": removed(f"{T}.textualInversion"),
        "method: TextualInversion": {f"{T}.method": "TextualInversion"},
    },
    "inversion-without-token": {
        "textualInversion: {placeholderToken: <cat-toy>, initializerToken: toy}": {f"{T}.textualInversion": INVERSION},
    },
    "token-from-itself": {
        "a word that the text encoder knows": {f"{T}.textualInversion.initializerToken": "cat"},
        "toy": {f"{T}.textualInversion.initializerToken": "toy"},
    },
    "inversion-from-nothing": {
        "a word that is close to the subject, e.g. initializerToken: toy": {
            f"{T}.textualInversion.initializerToken": "toy"
        },
        "an embedding to start from, e.g. base: learned_embeds.safetensors": {
            f"{T}.textualInversion.base": "learned_embeds.safetensors"
        },
    },
    "embedding-and-checkpoint": {
        "leave base out": removed(f"{T}.textualInversion.base"),
        "leave checkpoint.from out": removed("spec.checkpoint.from"),
    },
    "lora-and-checkpoint": {
        "leave base out": removed(f"{T}.lora.base"),
        "leave checkpoint.from out": removed("spec.checkpoint.from"),
    },
    "from-two-places": {
        "one of them, e.g. from: {job: circles}": {"spec.checkpoint.from": {"job": "circles"}},
    },
    "from-a-page": {
        "s3://, gs:// or az:// followed by the bucket and a folder": {"spec.checkpoint.from": {"url": "gs://models/a"}},
        "s3://models/checkpoints/default/circles-1f0c3a2b": {
            "spec.checkpoint.from": {"url": "s3://models/checkpoints/default/circles-1f0c3a2b"},
        },
    },
    "from-a-sentence": names("spec.checkpoint.from.job"),
    "from-for-a-script": {"leave from out": removed("spec.checkpoint.from")},
    "controlnet-for-lora": {
        "leave controlnet out": removed(f"{T}.controlnet"),
        "method: ControlNet with dataset.columns.conditioning": METHODS["ControlNet"],
    },
    "controlnet-without-column": {"columns: {conditioning: conditioning_image}": CONDITIONED},
    "streamed-crops": {
        "training.centerCrop: true": {f"{T}.centerCrop": True},
        "training.aspectBuckets: true": {f"{T}.aspectBuckets": True},
        "leave streaming out": removed("spec.dataset.streaming"),
    },
    "streamed-script": {"leave streaming out": removed("spec.dataset.streaming")},
    "one-column": {"the name of the column that contains the captions": {"spec.dataset.columns.caption": "text"}},
    "condition-is-image": {
        "the name of the column that contains the conditioning images": {"spec.dataset.columns.conditioning": "edges"},
    },
    "empty-timestep-range": {
        "begin: 200 and end: 600": {f"{T}.timestepBias.begin": 200, f"{T}.timestepBias.end": 600},
    },
    "nothing-to-validate": {
        "prompts to draw": {f"{T}.validation.prompts": ["a dog"]},
        "the name of a held-out split": {f"{T}.validation.split": "validation"},
        "both": {f"{T}.validation.prompts": ["a dog"], f"{T}.validation.split": "validation"},
    },
    "validated-on-training-set": {"the name of a held-out split": {f"{T}.validation.split": "validation"}},
    "validation-of-script": {"leave validation out": removed(f"{T}.validation")},
    "half-precision-on-cpu": each(f"{T}.precision", ("bf16", "fp32")),
    "efficient-attention-on-cpu": each(f"{T}.attention", ("auto", "flash", "math")),
    "flash-attention-in-fp32": {
        "attention: auto": {f"{T}.attention": "auto"},
        "precision: bf16": {f"{T}.precision": "bf16"},
    },
    "8-bit-on-cpu": each(f"{T}.optimizer", ("adamw", "adafactor", "prodigy")),
    "cpu-preset-on-gpu": {
        "auto": {f"{T}.memoryPreset": "auto"},
        "cpu with accelerator: cpu": {"spec.topology.accelerator": "cpu"},
        "the GPU's memory": {f"{T}.memoryPreset": "80GB"},
        "16GB, with accelerator: gpu": {f"{T}.memoryPreset": "16GB", "spec.topology.accelerator": "gpu"},
    },
    "ccl-on-gpu": {
        "accelerator: cpu": {"spec.topology.accelerator": "cpu"},
        "leave backend out": removed("spec.topology.cpu.backend"),
    },
    "communication-cores-on-gpu": {
        "accelerator: cpu": {"spec.topology.accelerator": "cpu"},
        "leave coresForCommunication out": removed("spec.topology.cpu.coresForCommunication"),
    },
    "no-minimum": {"both": RANGE, "nodes instead": FIXED_NODES},
    "no-maximum": {"both": RANGE, "nodes instead": FIXED_NODES},
    "fixed-and-range": {"nodes for a fixed number": FIXED_NODES, "minNodes and maxNodes for a range": RANGE},
    "range-backwards": {"a number of at least minNodes": {"spec.topology.maxNodes": 4}},
    "other-number-of-gpus": {
        "leave it out": removed(RESOURCES),
        "the number of GPUs as processesPerNode": {"spec.topology": {"processesPerNode": 4}},
    },
    "gpus-on-cpu": {
        "leave it out": removed(RESOURCES),
        "the number of GPUs as processesPerNode": {"spec.topology": {"processesPerNode": 1}},
    },
    "misspelt-resource": {
        name: {RESOURCES: {value: 1}}
        for name, value in {
            "an extended resource with its domain": "example.com/fpga",
            "vendor.com/device": "vendor.com/device",
            "cpu": "cpu",
            "memory": "memory",
            "ephemeral-storage": "ephemeral-storage",
        }.items()
    },
    "no-quantity": QUANTITIES,
    "negative-cpu": QUANTITIES,
    "no-volume": {
        "one of them": STORAGES["bucket"],
        "persistentVolumeClaim: {claimName: checkpoints}": STORAGES["persistentVolumeClaim"],
    },
    "two-volumes": {
        "one of them": STORAGES["hostPath"],
        "persistentVolumeClaim: {claimName: checkpoints}": STORAGES["persistentVolumeClaim"],
    },
    "bucket-is-a-page": {
        "s3://, gs:// or az:// followed by the bucket and a folder": {f"{STORAGE}.bucket.url": "gs://models/runs"},
        "s3://models/checkpoints": {f"{STORAGE}.bucket.url": "s3://models/checkpoints"},
    },
    "endpoint-without-scheme": {
        "https://minio.example.com": {f"{STORAGE}.bucket.endpoint": "https://minio.example.com"},
        "leave endpoint out": removed(f"{STORAGE}.bucket.endpoint"),
    },
    "endpoint-for-none": {"leave endpoint out": removed(f"{STORAGE}.bucket.endpoint")},
    "scratch-for-slices": {"leave scratch out": removed("spec.checkpoint.scratch")},
    "scratch-size": {"50Gi": {"spec.checkpoint.scratch.sizeLimit": "50Gi"}},
    "sharded-adafactor": {
        "optimizer: adamw": {f"{T}.optimizer": "adamw"},
        "leave sharding out": removed(f"{T}.sharding"),
    },
    "sharded-lora": {"leave sharding out": removed(f"{T}.sharding")},
    "bf16-weights-of-adapters": {"leave weightPrecision out": removed(f"{T}.weightPrecision")},
    "bf16-weights-in-fp32-passes": {
        "precision: bf16": {f"{T}.precision": "bf16"},
        "leave weightPrecision out": removed(f"{T}.weightPrecision"),
    },
    "bf16-weights-in-slices": {
        "leave weightPrecision out": removed(f"{T}.weightPrecision"),
        "leave sharding out": removed(f"{T}.sharding"),
    },
    "bf16-weights-of-prodigy": {
        "leave weightPrecision out": removed(f"{T}.weightPrecision"),
        "optimizer: adamw": {f"{T}.optimizer": "adamw"},
    },
    "offload-of-no-slices": {
        "leave offload out": removed(f"{T}.offload"),
        **{name: METHODS[name] | {f"{T}.sharding": "full"} for name in ("DreamBooth", "Full", "ControlNet")},
        "sharding: full": {f"{T}.sharding": "full"},
    },
    "offload-on-cpu": {"leave offload out": removed(f"{T}.offload")},
    "two-intervals": {
        "leave steps out": removed("spec.checkpoint.interval.steps"),
        "leave seconds out": removed("spec.checkpoint.interval.seconds"),
        "leave both out for an automatic interval": removed("spec.checkpoint.interval"),
    },
    "outputs-overwrite": {
        "a different to for each": {
            "spec.outputs": [{"format": "webui", "to": "webui"}, {"format": "kohya", "to": "kohya"}],
        },
    },
    "kohya-of-full": DIFFUSERS,
    **OUTPUT_ADVICE,
    **POD_ADVICE,
    "secret-twice": {"each Secret once": {"spec.secrets": [{"name": "a"}]}},
}
"""For each row of `bad_manifests.BAD` the advice of its message."""
