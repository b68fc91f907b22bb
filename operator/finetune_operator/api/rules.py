"""What a FineTuneJob must fulfil beyond the types and bounds of its fields: one table for the CRD and for Python.

Each rule stands here once, as the CEL that the API server evaluates at `kubectl apply` and as the predicate that
`validate` evaluates everywhere else, with one sentence for both. A test lets the two judge the same random jobs.

In CEL, `has(self.x)` is Python's `x is not None`; fields with a default are always there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from finetune_contract.spec import (
    CheckpointInterval,
    Columns,
    DreamBoothSpec,
    LrScheduler,
    Method,
    Optimizer,
    OutputFormat,
    Precision,
    Sharding,
    TextualInversionSpec,
    TimestepBiasSpec,
    TrainingSpec,
    ValidationSpec,
)
from finetune_operator.api import duration
from finetune_operator.api.job import (
    Accelerator,
    BucketSpec,
    CpuBackend,
    FineTuneJobSpec,
    ObjectMeta,
    StorageSpec,
    TopologySpec,
)
from finetune_operator.api.names import MAX_JOB_NAME
from finetune_operator.api.rule import Cause, Rule, Scope, cel_words, form

JOB = Scope("metadata", ObjectMeta, at_root=True)
SPEC = Scope("spec", FineTuneJobSpec)
COLUMNS = Scope("spec.dataset.columns", Columns)
TRAINING = Scope("spec.training", TrainingSpec)
DREAMBOOTH = Scope("spec.training.dreambooth", DreamBoothSpec)
TEXTUAL_INVERSION = Scope("spec.training.textualInversion", TextualInversionSpec)
TIMESTEP_BIAS = Scope("spec.training.timestepBias", TimestepBiasSpec)
VALIDATION = Scope("spec.training.validation", ValidationSpec)
TOPOLOGY = Scope("spec.topology", TopologySpec)
STORAGE = Scope("spec.checkpoint.storage", StorageSpec)
BUCKET = Scope("spec.checkpoint.storage.bucket", BucketSpec)
INTERVAL = Scope("spec.checkpoint.interval", CheckpointInterval)

LORA_METHODS = (Method.LORA, Method.DREAMBOOTH_LORA)
DREAMBOOTH_METHODS = (Method.DREAMBOOTH, Method.DREAMBOOTH_LORA)
SHARDED_METHODS = (Method.FULL, Method.DREAMBOOTH, Method.CONTROLNET)
GPU_RESOURCE = "nvidia.com/gpu"

DNS_LABEL = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
DNS_NAME = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
QUANTITY = "^[+]?([0-9]+([.][0-9]*)?|[.][0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][-+]?[0-9]{1,3})?$"
RESOURCE = "^(cpu|memory|ephemeral-storage|hugepages-.+|.+/.+)$"
MANAGER = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/[a-zA-Z0-9]([-._a-zA-Z0-9]*[a-zA-Z0-9])?$"
BUCKET_URL = "^(s3|gs|az)://[a-z0-9][-._a-z0-9]{1,61}[a-z0-9](/[^/?#]+)*/?$"
WEB_ADDRESS = "^https?://[^/?#]+/?$"
MEMORY_PRESET = "^(auto|cpu|[1-9][0-9]{0,3}GB)$"


def _object_name(path: str) -> Rule[str]:
    name = path.rpartition(".")[2].removesuffix("[]")
    return form(
        path, DNS_NAME, f"{name} is not the name of a Kubernetes object; write lower-case letters, digits, '-' and '.'"
    )


def _duration(path: str) -> Rule[str]:
    name = path.rpartition(".")[2]
    return Rule(
        Scope(path, str),
        "",
        f"self.matches(r'{duration.PATTERN}') && self.matches('[1-9]')",
        lambda text: re.fullmatch(duration.PATTERN, text) is not None and re.search("[1-9]", text) is not None,
        f"{name} is not a length of time; write e.g. 90s, 10m or 1h30m",
    )


def _absolute(path: str) -> Rule[str]:
    return Rule(
        Scope(path, str),
        "",
        "self.startsWith('/') && !(self + '/').contains('/../')",
        lambda text: text.startswith("/") and "/../" not in text + "/",
        "path is not absolute; write it from the root on and without '..', e.g. /mnt/checkpoints",
    )


def _no_web_address(path: str, example: str) -> Rule[str]:
    name = path.rpartition(".")[2]
    return Rule(
        Scope(path, str),
        "",
        "!self.startsWith('http://') && !self.startsWith('https://')",
        lambda text: not text.startswith(("http://", "https://")),
        f"{name} is a web address, which is not read; write its hub id, e.g. {example}, a folder or an s3:// URL",
    )


def _only_for(field: str, methods: tuple[Method, ...], block: Callable[[TrainingSpec], object]) -> Rule[TrainingSpec]:
    """The settings of a method are refused where another one, or a script, would not read them."""
    return Rule(
        TRAINING,
        field,
        f"!has(self.{field}) || has(self.method) && self.method in {cel_words(methods)}",
        lambda training: block(training) is None or training.method in methods,
        f"{field} is read by {' and '.join(methods)} only; leave {field} out, or write method: {methods[0]}",
        Cause.FORBIDDEN,
    )


def _needed_for(
    field: str, methods: tuple[Method, ...], block: Callable[[TrainingSpec], object], example: str
) -> Rule[TrainingSpec]:
    return Rule(
        TRAINING,
        field,
        f"has(self.{field}) || !has(self.method) || !(self.method in {cel_words(methods)})",
        lambda training: block(training) is not None or training.method not in methods,
        f"{field} is needed by {' and '.join(methods)}; write e.g. {field}: {example}",
        Cause.REQUIRED,
    )


_NAMES = (
    Rule(
        JOB,
        "name",
        f"self.metadata.name.size() <= {MAX_JOB_NAME}",
        lambda meta: len(meta.name) <= MAX_JOB_NAME,
        f"name is longer than {MAX_JOB_NAME} characters, so its pods' names would be longer than Kubernetes allows; "
        f"write a name of at most {MAX_JOB_NAME}",
    ),
    Rule(
        JOB,
        "name",
        f"self.metadata.name.matches(r'{DNS_LABEL}')",
        lambda meta: re.fullmatch(DNS_LABEL, meta.name) is not None,
        "name cannot be a host name; write lower-case letters, digits and '-', a letter first and no '-' at the end",
    ),
    _object_name("spec.queueName"),
    _object_name("spec.priorityClassName"),
    _object_name("spec.secrets[].name"),
    form(
        "spec.managedBy",
        MANAGER,
        "managedBy is not the name of a controller; write its domain and name, e.g. kueue.x-k8s.io/multikueue, or "
        "leave it out for this operator",
    ),
    _object_name("spec.checkpoint.storage.persistentVolumeClaim.claimName"),
)

_DATA = (
    _no_web_address("spec.model.base", "stabilityai/stable-diffusion-xl-base-1.0"),
    _no_web_address("spec.dataset.source", "lambdalabs/naruto-blip-captions"),
    Rule(
        COLUMNS,
        "caption",
        "self.caption != self.image",
        lambda columns: columns.caption != columns.image,
        "caption and image are the same column; write the name of the column with the texts for caption",
    ),
    Rule(
        COLUMNS,
        "conditioning",
        "!has(self.conditioning) || self.conditioning != self.image && self.conditioning != self.caption",
        lambda columns: columns.conditioning not in (columns.image, columns.caption),
        "conditioning is the column of image or caption; write the name of the column with the conditioning images",
    ),
    Rule(
        SPEC,
        "dataset.columns.conditioning",
        "!has(self.training.method) || self.training.method != 'ControlNet' || has(self.dataset.columns.conditioning)",
        lambda spec: spec.training.method is not Method.CONTROLNET or spec.dataset.columns.conditioning is not None,
        "conditioning is needed by ControlNet; write e.g. columns: {conditioning: conditioning_image}",
        Cause.REQUIRED,
    ),
    Rule(
        SPEC,
        "training.validation.split",
        "!has(self.training.validation) || !has(self.training.validation.split)"
        " || self.training.validation.split != self.dataset.split",
        lambda spec: spec.training.validation is None or spec.training.validation.split != spec.dataset.split,
        "split is the one that is trained on, so its loss would say nothing; write the name of a held-out split",
    ),
)

_TRAINING = (
    Rule(
        TRAINING,
        "method",
        "has(self.method) || has(self.script)",
        lambda training: training.method is not None or training.script is not None,
        "method is missing; write e.g. method: LoRA, or a script with its path",
        Cause.REQUIRED,
    ),
    Rule(
        TRAINING,
        "script",
        "!has(self.method) || !has(self.script)",
        lambda training: training.method is None or training.script is None,
        "method and script contradict each other; leave one of them out",
        Cause.FORBIDDEN,
    ),
    Rule(
        TRAINING,
        "steps",
        "has(self.steps) || has(self.epochs) || !has(self.method)",
        lambda training: (training.steps, training.epochs) != (None, None) or training.method is None,
        "steps is missing; write e.g. steps: 1000, or epochs: 10",
        Cause.REQUIRED,
    ),
    Rule(
        TRAINING,
        "epochs",
        "!has(self.steps) || !has(self.epochs)",
        lambda training: training.steps is None or training.epochs is None,
        "steps and epochs contradict each other; leave one of them out",
        Cause.FORBIDDEN,
    ),
    Rule(
        TRAINING,
        "lrWarmupSteps",
        "!has(self.steps) || self.lrWarmupSteps == 0 || self.lrWarmupSteps < self.steps",
        lambda training: (
            not training.steps or not training.lr_warmup_steps or training.lr_warmup_steps < training.steps
        ),
        "lrWarmupSteps leaves no step at the full learning rate; write fewer than steps",
    ),
    Rule(
        TRAINING,
        "lrWarmupSteps",
        "self.lrWarmupSteps == 0 || self.lrScheduler != 'constant'",
        lambda training: training.lr_warmup_steps == 0 or training.lr_scheduler is not LrScheduler.CONSTANT,
        "lrWarmupSteps is not read by lrScheduler constant; write lrScheduler: constant_with_warmup",
    ),
    Rule(
        TRAINING,
        "sharding",
        f"self.sharding == 'none' || has(self.method) && self.method in {cel_words(SHARDED_METHODS)}",
        lambda training: training.sharding is Sharding.NONE or training.method in SHARDED_METHODS,
        f"sharding is for {', '.join(SHARDED_METHODS)}, which train whole models; leave sharding out",
        Cause.FORBIDDEN,
    ),
    Rule(
        TRAINING,
        "sharding",
        "self.sharding == 'none' || self.optimizer == 'adamw'",
        lambda training: training.sharding is Sharding.NONE or training.optimizer is Optimizer.ADAMW,
        "sharding cuts the optimizer's state into slices, which only AdamW's allows; write optimizer: adamw, or leave "
        "sharding out",
        Cause.FORBIDDEN,
    ),
    form(
        "spec.training.memoryPreset",
        MEMORY_PRESET,
        "memoryPreset is unknown; write auto, cpu or the GPU's memory, e.g. 16GB",
    ),
    _only_for("lora", LORA_METHODS, lambda training: training.lora),
    _only_for("dreambooth", DREAMBOOTH_METHODS, lambda training: training.dreambooth),
    _needed_for(
        "dreambooth",
        DREAMBOOTH_METHODS,
        lambda training: training.dreambooth,
        "{instancePrompt: a photo of sks dog}",
    ),
    _only_for("textualInversion", (Method.TEXTUAL_INVERSION,), lambda training: training.textual_inversion),
    _needed_for(
        "textualInversion",
        (Method.TEXTUAL_INVERSION,),
        lambda training: training.textual_inversion,
        "{placeholderToken: <cat-toy>, initializerToken: toy}",
    ),
    _only_for("controlnet", (Method.CONTROLNET,), lambda training: training.controlnet),
    Rule(
        TRAINING,
        "validation",
        "!has(self.validation) || has(self.method)",
        lambda training: training.validation is None or training.method is not None,
        "validation is not read by a script; leave it out, or tell the script by its args",
        Cause.FORBIDDEN,
    ),
    Rule(
        VALIDATION,
        "prompts",
        "self.prompts.size() > 0 || has(self.split)",
        lambda validation: len(validation.prompts) > 0 or validation.split is not None,
        "validation has nothing to look at; write prompts to draw, a held-out split, or both",
        Cause.REQUIRED,
    ),
    Rule(
        DREAMBOOTH,
        "classPrompt",
        "has(self.classPrompt) || self.numClassImages == 100 && self.priorLossWeight == 1.0",
        lambda dreambooth: (
            dreambooth.class_prompt is not None
            or (dreambooth.num_class_images == 100 and dreambooth.prior_loss_weight == 1.0)
        ),
        "numClassImages and priorLossWeight need classPrompt; write e.g. classPrompt: a photo of a dog",
        Cause.REQUIRED,
    ),
    form(
        "spec.training.textualInversion.placeholderToken",
        r"^[^ \t\n\r]+$",
        "placeholderToken has a space in it; write one token, e.g. <cat-toy>",
    ),
    Rule(
        TEXTUAL_INVERSION,
        "initializerToken",
        "self.initializerToken != self.placeholderToken",
        lambda inversion: inversion.initializer_token != inversion.placeholder_token,
        "initializerToken is the new token itself; write a word that the text encoder knows, e.g. toy",
    ),
    Rule(
        TIMESTEP_BIAS,
        "end",
        "self.begin < self.end",
        lambda bias: bias.begin < bias.end,
        "end is not after begin, so the range holds no timestep; write e.g. begin: 200 and end: 600",
    ),
    Rule(
        SPEC,
        "training.precision",
        "self.topology.accelerator != 'cpu' || self.training.precision != 'fp16'",
        lambda spec: spec.topology.accelerator is not Accelerator.CPU or spec.training.precision is not Precision.FP16,
        "precision fp16 is for GPUs; write bf16 or fp32 with accelerator cpu",
    ),
    Rule(
        SPEC,
        "training.optimizer",
        "self.topology.accelerator != 'cpu' || self.training.optimizer != 'adamw8bit'",
        lambda spec: (
            spec.topology.accelerator is not Accelerator.CPU or spec.training.optimizer is not Optimizer.ADAMW_8BIT
        ),
        "optimizer adamw8bit is for GPUs; write adamw or adafactor with accelerator cpu",
    ),
    Rule(
        SPEC,
        "training.memoryPreset",
        "!has(self.training.memoryPreset) || self.training.memoryPreset == 'auto'"
        " || (self.training.memoryPreset == 'cpu') == (self.topology.accelerator == 'cpu')",
        lambda spec: (
            spec.training.memory_preset in (None, "auto")
            or (spec.training.memory_preset == "cpu") == (spec.topology.accelerator is Accelerator.CPU)
        ),
        "memoryPreset is not for this accelerator; write auto, cpu with accelerator cpu, or the GPU's memory",
    ),
)

_TOPOLOGY = (
    Rule(
        TOPOLOGY,
        "minNodes",
        "has(self.minNodes) || !has(self.maxNodes)",
        lambda topology: topology.min_nodes is not None or topology.max_nodes is None,
        "maxNodes needs minNodes; write both, or nodes",
        Cause.REQUIRED,
    ),
    Rule(
        TOPOLOGY,
        "maxNodes",
        "has(self.maxNodes) || !has(self.minNodes)",
        lambda topology: topology.max_nodes is not None or topology.min_nodes is None,
        "minNodes needs maxNodes; write both, or nodes",
        Cause.REQUIRED,
    ),
    Rule(
        TOPOLOGY,
        "nodes",
        "!has(self.nodes) || !has(self.minNodes) && !has(self.maxNodes)",
        lambda topology: topology.nodes is None or (topology.min_nodes, topology.max_nodes) == (None, None),
        "nodes contradicts minNodes and maxNodes; write nodes for a fixed number, the other two for a range",
        Cause.FORBIDDEN,
    ),
    Rule(
        TOPOLOGY,
        "maxNodes",
        "!has(self.minNodes) || !has(self.maxNodes) || self.minNodes <= self.maxNodes",
        lambda topology: (
            topology.min_nodes is None or topology.max_nodes is None or topology.min_nodes <= topology.max_nodes
        ),
        "maxNodes is smaller than minNodes; write at least minNodes",
    ),
    Rule(
        TOPOLOGY,
        "cpu.backend",
        "self.accelerator == 'cpu' || self.cpu.backend != 'ccl'",
        lambda topology: topology.accelerator is Accelerator.CPU or topology.cpu.backend is not CpuBackend.CCL,
        "backend ccl is for CPUs; write accelerator: cpu, or leave backend out, for GPUs take NCCL by themselves",
    ),
    Rule(
        TOPOLOGY,
        "resources",
        f"!has(self.resources) || !('{GPU_RESOURCE}' in self.resources) || self.accelerator == 'gpu'"
        f" && string(self.resources['{GPU_RESOURCE}']) == string(self.processesPerNode)",
        lambda topology: (
            GPU_RESOURCE not in (topology.resources or {})
            or (
                topology.accelerator is Accelerator.GPU
                and str((topology.resources or {})[GPU_RESOURCE]) == str(topology.processes_per_node)
            )
        ),
        f"resources has {GPU_RESOURCE}, which follows processesPerNode and is none on cpu; leave it out and write "
        "processesPerNode",
    ),
    Rule(
        TOPOLOGY,
        "resources",
        f"!has(self.resources) || self.resources.all(name, name.matches(r'{RESOURCE}'))",
        lambda topology: all(re.fullmatch(RESOURCE, name) for name in topology.resources or {}),
        "resources names something unknown; write cpu, memory, ephemeral-storage, or an extended resource with its "
        "domain, e.g. vendor.com/device",
    ),
    Rule(
        TOPOLOGY,
        "resources",
        # Not QUANTITY: the API server cannot bound the length of what may be number or text, nor the cost of a pattern.
        "!has(self.resources) || self.resources.all(name, isQuantity(string(self.resources[name]))"
        " && !string(self.resources[name]).startsWith('-'))",
        lambda topology: all(re.fullmatch(QUANTITY, str(amount)) for amount in (topology.resources or {}).values()),
        "resources has an amount that is not a Kubernetes quantity; write e.g. cpu: 8, cpu: 500m, memory: 32Gi",
    ),
)

_CHECKPOINT = (
    Rule(
        STORAGE,
        "",
        "[has(self.persistentVolumeClaim), has(self.hostPath), has(self.nfs), has(self.bucket)]"
        ".filter(given, given).size() == 1",
        lambda storage: (
            [storage.persistent_volume_claim, storage.host_path, storage.nfs, storage.bucket].count(None) == 3
        ),
        "storage needs exactly one of persistentVolumeClaim, hostPath, nfs and bucket; write e.g. "
        "persistentVolumeClaim: {claimName: checkpoints}",
    ),
    _absolute("spec.checkpoint.storage.hostPath.path"),
    _absolute("spec.checkpoint.storage.nfs.path"),
    form(
        "spec.checkpoint.storage.bucket.url",
        BUCKET_URL,
        "url is no folder of an object store; write s3://, gs:// or az:// with the bucket's name and a folder behind "
        "it, e.g. s3://models/checkpoints",
    ),
    form(
        "spec.checkpoint.storage.bucket.endpoint",
        WEB_ADDRESS,
        "endpoint is no web address; write e.g. https://minio.example.com, or leave it out",
    ),
    Rule(
        BUCKET,
        "endpoint",
        "!has(self.endpoint) || self.url.startsWith('s3://')",
        lambda bucket: bucket.endpoint is None or bucket.url.startswith("s3://"),
        "endpoint is read for s3:// only; leave it out",
        Cause.FORBIDDEN,
    ),
    Rule(
        SPEC,
        "checkpoint.scratch",
        "!has(self.checkpoint) || !has(self.checkpoint.scratch) || self.training.sharding == 'none'",
        lambda spec: spec.checkpoint.scratch is None or spec.training.sharding is Sharding.NONE,
        "scratch holds whole checkpoints, and with sharding no node has one; leave scratch out",
        Cause.FORBIDDEN,
    ),
    form(
        "spec.checkpoint.scratch.sizeLimit",
        QUANTITY,
        "sizeLimit is not a Kubernetes quantity; write e.g. 50Gi",
    ),
    Rule(
        INTERVAL,
        "seconds",
        "!has(self.steps) || !has(self.seconds)",
        lambda interval: interval.steps is None or interval.seconds is None,
        "steps and seconds contradict each other; leave one of them out, or both for an interval that suits the job",
        Cause.FORBIDDEN,
    ),
)

_RETENTION = (
    _duration("spec.checkpoint.maxStale"),
    Rule(
        SPEC,
        "checkpoint.keepBest",
        "!has(self.checkpoint) || !has(self.checkpoint.keepBest) || !self.checkpoint.keepBest || "
        "(has(self.training.validation) && has(self.training.validation.split))",
        lambda spec: (
            not spec.checkpoint.keep_best
            or (spec.training.validation is not None and spec.training.validation.split is not None)
        ),
        "the best checkpoint is found by the held-out loss; add training.validation.split, or leave keepBest out",
        Cause.FORBIDDEN,
    ),
)

_RECOVERY = (
    _duration("spec.recovery.shrinkAfter"),
    _duration("spec.recovery.hangTimeout"),
    _duration("spec.recovery.spot.fallbackAfter"),
)

_OUTPUTS = (
    Rule(
        SPEC,
        "outputs",
        "self.outputs.all(one, self.outputs.exists_one(other, other.to == one.to))",
        lambda spec: len({output.to for output in spec.outputs}) == len(spec.outputs),
        "outputs has two with the same place, and the second would overwrite the first; write another to for each",
    ),
    Rule(
        SPEC,
        "outputs",
        f"self.outputs.all(output, !(output.format in {cel_words((OutputFormat.KOHYA, OutputFormat.MERGED))}))"
        f" || has(self.training.method) && self.training.method in {cel_words(LORA_METHODS)}",
        lambda spec: all(
            output.format not in (OutputFormat.KOHYA, OutputFormat.MERGED) or spec.training.method in LORA_METHODS
            for output in spec.outputs
        ),
        "outputs has format kohya or merged, which only a LoRA has; write diffusers, webui or openvino",
    ),
    Rule(
        Scope("spec.outputs[].to", str),
        "",
        "!self.contains('://') || self.matches(r'^((s3|gs|az)://.+|hub://[^/]+/[^/]+)$')",
        lambda to: "://" not in to or re.fullmatch("^((s3|gs|az)://.+|hub://[^/]+/[^/]+)$", to) is not None,
        "to is no place that can be written; write a folder, s3://bucket/path or hub://owner/name",
    ),
    Rule(
        SPEC,
        "secrets",
        "self.secrets.all(one, self.secrets.exists_one(other, other.name == one.name))",
        lambda spec: max(Counter(secret.name for secret in spec.secrets).values(), default=1) == 1,
        "secrets names one twice; write each Secret once",
    ),
)

RULES: tuple[Rule[Any], ...] = (
    *_NAMES,
    *_DATA,
    *_TRAINING,
    *_TOPOLOGY,
    *_CHECKPOINT,
    *_RETENTION,
    *_RECOVERY,
    *_OUTPUTS,
)
"""All rules, in the order in which a manifest is written."""
