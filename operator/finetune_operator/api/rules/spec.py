"""What a FineTuneJob must fulfil beyond the types and bounds of its fields: one table for the CRD and for Python.

Each rule stands here once, as the CEL that the API server evaluates at `kubectl apply` and as the predicate that
`validate` evaluates everywhere else, with one sentence for both. A test lets the two judge the same random jobs.

In CEL, `has(self.x)` is Python's `x is not None`; fields with a default are always there.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from finetune_contract.spec import CheckpointInterval, Columns, Method, OutputFormat, Sharding
from finetune_operator.api.job import (
    Accelerator,
    BucketSpec,
    CpuBackend,
    ObjectMeta,
    StorageSpec,
    TopologySpec,
)
from finetune_operator.api.names import MAX_JOB_NAME
from finetune_operator.api.rules.forms import (
    BUCKET_URL,
    DNS_LABEL,
    MANAGER,
    QUANTITY,
    RESOURCE,
    WEB_ADDRESS,
    absolute,
    length_of_time,
    no_web_address,
    object_name,
)
from finetune_operator.api.rules.rule import Cause, Rule, Scope, cel_words, form
from finetune_operator.api.rules.training import LORA_METHODS, SPEC, TRAINING_RULES

JOB = Scope("metadata", ObjectMeta, at_root=True)
COLUMNS = Scope("spec.dataset.columns", Columns)
TOPOLOGY = Scope("spec.topology", TopologySpec)
STORAGE = Scope("spec.checkpoint.storage", StorageSpec)
BUCKET = Scope("spec.checkpoint.storage.bucket", BucketSpec)
INTERVAL = Scope("spec.checkpoint.interval", CheckpointInterval)

GPU_RESOURCE = "nvidia.com/gpu"

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
    object_name("spec.queueName"),
    object_name("spec.priorityClassName"),
    object_name("spec.secrets[].name"),
    form(
        "spec.managedBy",
        MANAGER,
        "managedBy is not the name of a controller; write its domain and name, e.g. kueue.x-k8s.io/multikueue, or "
        "leave it out for this operator",
    ),
    object_name("spec.checkpoint.storage.persistentVolumeClaim.claimName"),
)

_DATA = (
    no_web_address("spec.model.base", "stabilityai/stable-diffusion-xl-base-1.0"),
    no_web_address("spec.dataset.source", "lambdalabs/naruto-blip-captions"),
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
        "dataset.streaming",
        "!self.dataset.streaming || !has(self.training.method) || self.training.centerCrop"
        " || self.training.aspectBuckets",
        lambda spec: (
            not spec.dataset.streaming
            or spec.training.method is None
            or spec.training.center_crop
            or spec.training.aspect_buckets
        ),
        "streaming reads each image once, and a random crop needs it in each epoch; write training.centerCrop: true or "
        "training.aspectBuckets: true, or leave streaming out",
        Cause.FORBIDDEN,
    ),
    Rule(
        SPEC,
        "dataset.streaming",
        "!self.dataset.streaming || has(self.training.method)",
        lambda spec: not spec.dataset.streaming or spec.training.method is not None,
        "streaming is not read by a script; leave it out, or tell the script by its args",
        Cause.FORBIDDEN,
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
    absolute("spec.checkpoint.storage.hostPath.path"),
    absolute("spec.checkpoint.storage.nfs.path"),
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
    length_of_time("spec.checkpoint.maxStale"),
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
    length_of_time("spec.recovery.shrinkAfter"),
    length_of_time("spec.recovery.hangTimeout"),
    length_of_time("spec.recovery.spot.fallbackAfter"),
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
    *TRAINING_RULES,
    *_TOPOLOGY,
    *_CHECKPOINT,
    *_RETENTION,
    *_RECOVERY,
    *_OUTPUTS,
)
"""All rules, in the order in which a manifest is written."""
