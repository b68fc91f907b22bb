"""Rules that a FineTuneJob must satisfy beyond the types and bounds of its fields: one table for the CRD and Python.

Each rule is defined once: as the CEL expression that the API server evaluates at `kubectl apply`, as the predicate that
`validate` evaluates everywhere else, and as one message for both. A test runs both on the same random jobs.

In CEL, `has(self.x)` is Python's `x is not None`; fields with a default are always present.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from finetune_contract.input_spec import Columns
from finetune_contract.methods import CENTRED_METHODS, CONDITIONED_METHODS, crops_at_centre
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.spec import CheckpointInterval, CheckpointSource, Sharding
from finetune_operator.api.job import Accelerator, ObjectMeta
from finetune_operator.api.names import MAX_JOB_NAME
from finetune_operator.api.rules.cpu import CPU_RULES, TOPOLOGY
from finetune_operator.api.rules.dataset import DATASET_RULES
from finetune_operator.api.rules.forms import (
    BUCKET_URL,
    DNS_LABEL,
    DNS_NAME,
    MANAGER,
    QUANTITY,
    RESOURCE,
    WEB_ADDRESS,
    absolute_path,
    is_duration,
    no_web_address,
    object_name,
)
from finetune_operator.api.rules.outputs import OUTPUT_RULES
from finetune_operator.api.rules.pods import GPU_RESOURCE, POD_RULES
from finetune_operator.api.rules.rule import FieldErrorReason, Rule, Scope, cel_list, form, join_names
from finetune_operator.api.rules.script import SCRIPT_RULES
from finetune_operator.api.rules.training import SPEC, TRAINING_RULES
from finetune_operator.api.storage import BucketSpec, StorageSpec

JOB = Scope("metadata", ObjectMeta, at_root=True)
COLUMNS = Scope("spec.dataset.columns", Columns)
STORAGE = Scope("spec.checkpoint.storage", StorageSpec)
BUCKET = Scope("spec.checkpoint.storage.bucket", BucketSpec)
INTERVAL = Scope("spec.checkpoint.interval", CheckpointInterval)
START = Scope("spec.checkpoint.from", CheckpointSource)

_NAMES = (
    Rule(
        JOB,
        "name",
        f"self.metadata.name.size() <= {MAX_JOB_NAME}",
        lambda meta: len(meta.name) <= MAX_JOB_NAME,
        f"name is longer than {MAX_JOB_NAME} characters, so the names of its pods would be too long for Kubernetes; "
        f"write a name of at most {MAX_JOB_NAME} characters",
    ),
    Rule(
        JOB,
        "name",
        f"self.metadata.name.matches(r'{DNS_LABEL}')",
        lambda meta: re.fullmatch(DNS_LABEL, meta.name) is not None,
        "name is not a valid host name; write lower-case letters, digits and '-', with a letter first and no '-' at "
        "the end",
    ),
    form(
        "spec.queueName",
        DNS_NAME,
        "queueName is not the name of a LocalQueue of Kueue (lower-case letters, digits, '-' and '.'); leave queueName "
        "out",
    ),
    object_name("spec.priorityClassName"),
    object_name("spec.secrets[].name"),
    object_name("spec.outputs[].secret.name"),
    form(
        "spec.managedBy",
        MANAGER,
        "managedBy is not the name of a controller; write its domain and name, e.g. kueue.x-k8s.io/multikueue, or "
        "leave managedBy out for this operator",
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
        "caption and image name the same column; write the name of the column that contains the captions",
    ),
    Rule(
        COLUMNS,
        "conditioning",
        "!has(self.conditioning) || self.conditioning != self.image && self.conditioning != self.caption",
        lambda columns: columns.conditioning not in (columns.image, columns.caption),
        "conditioning names the column of image or caption; write the name of the column that contains the "
        "conditioning images",
    ),
    Rule(
        SPEC,
        "dataset.columns.conditioning",
        f"!has(self.training.method) || !(self.training.method in {cel_list(CONDITIONED_METHODS)})"
        " || has(self.dataset.columns.conditioning)",
        lambda spec: spec.training.method not in CONDITIONED_METHODS or spec.dataset.columns.conditioning is not None,
        f"conditioning is required for {join_names(CONDITIONED_METHODS)}; write e.g. columns: {{conditioning: "
        "conditioning_image}",
        FieldErrorReason.REQUIRED,
    ),
    Rule(
        SPEC,
        "dataset.streaming",
        "!self.dataset.streaming || !has(self.training.method) || self.training.aspectBuckets"
        " || (has(self.training.centerCrop) ? self.training.centerCrop"
        f" : self.training.method in {cel_list(CENTRED_METHODS)})",
        lambda spec: (
            not spec.dataset.streaming
            or spec.training.method is None
            or crops_at_centre(spec.training)
            or spec.training.aspect_buckets
        ),
        "streaming reads each image once, but random crops need it in each epoch; write training.centerCrop: true or "
        "training.aspectBuckets: true, or leave streaming out",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        SPEC,
        "dataset.streaming",
        "!self.dataset.streaming || has(self.training.method)",
        lambda spec: not spec.dataset.streaming or spec.training.method is not None,
        "streaming is not supported with a script; leave streaming out",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        SPEC,
        "training.validation.split",
        "!has(self.training.validation) || !has(self.training.validation.split)"
        " || self.training.validation.split != self.dataset.split",
        lambda spec: spec.training.validation is None or spec.training.validation.split != spec.dataset.split,
        "split is also the training split (dataset.split), so its loss shows no generalization; write the name of a "
        "held-out split",
    ),
)

_TOPOLOGY = (
    Rule(
        TOPOLOGY,
        "minNodes",
        "has(self.minNodes) || !has(self.maxNodes)",
        lambda topology: topology.min_nodes is not None or topology.max_nodes is None,
        "maxNodes requires minNodes; write both, or write nodes instead",
        FieldErrorReason.REQUIRED,
    ),
    Rule(
        TOPOLOGY,
        "maxNodes",
        "has(self.maxNodes) || !has(self.minNodes)",
        lambda topology: topology.max_nodes is not None or topology.min_nodes is None,
        "minNodes requires maxNodes; write both, or write nodes instead",
        FieldErrorReason.REQUIRED,
    ),
    Rule(
        TOPOLOGY,
        "nodes",
        "!has(self.nodes) || !has(self.minNodes) && !has(self.maxNodes)",
        lambda topology: topology.nodes is None or (topology.min_nodes, topology.max_nodes) == (None, None),
        "nodes excludes minNodes and maxNodes; write nodes for a fixed number, or minNodes and maxNodes for a range",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        TOPOLOGY,
        "maxNodes",
        "!has(self.minNodes) || !has(self.maxNodes) || self.minNodes <= self.maxNodes",
        lambda topology: (
            topology.min_nodes is None or topology.max_nodes is None or topology.min_nodes <= topology.max_nodes
        ),
        "maxNodes is smaller than minNodes; write a number of at least minNodes",
    ),
    *CPU_RULES,
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
        f"resources sets {GPU_RESOURCE}, which is derived: processesPerNode on gpu, none on cpu; leave it out, and "
        "write the number of GPUs as processesPerNode",
    ),
    Rule(
        TOPOLOGY,
        "resources",
        f"!has(self.resources) || self.resources.all(name, name.matches(r'{RESOURCE}'))",
        lambda topology: all(re.fullmatch(RESOURCE, name) for name in topology.resources or {}),
        "resources has an unknown name; write cpu, memory, ephemeral-storage or an extended resource with its domain, "
        "e.g. vendor.com/device",
    ),
    Rule(
        TOPOLOGY,
        "resources",
        # Not QUANTITY: the API server cannot bound the length of an int-or-string, and so not the cost of a pattern.
        "!has(self.resources) || self.resources.all(name, isQuantity(string(self.resources[name]))"
        " && !string(self.resources[name]).startsWith('-'))",
        lambda topology: all(re.fullmatch(QUANTITY, str(amount)) for amount in (topology.resources or {}).values()),
        "resources has an amount that is not a Kubernetes quantity; write e.g. cpu: 8, cpu: 500m or memory: 32Gi",
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
        "storage needs exactly one of persistentVolumeClaim, hostPath, nfs and bucket; write one of them, e.g. "
        "persistentVolumeClaim: {claimName: checkpoints}",
    ),
    absolute_path("spec.checkpoint.storage.hostPath.path"),
    absolute_path("spec.checkpoint.storage.nfs.path"),
    form(
        "spec.checkpoint.storage.bucket.url",
        BUCKET_URL,
        "url is not a folder of an object store; write s3://, gs:// or az:// followed by the bucket and a folder, e.g. "
        "s3://models/checkpoints",
    ),
    form(
        "spec.checkpoint.storage.bucket.endpoint",
        WEB_ADDRESS,
        "endpoint is not a web address; write e.g. https://minio.example.com, or leave endpoint out",
    ),
    Rule(
        BUCKET,
        "endpoint",
        "!has(self.endpoint) || self.url.startsWith('s3://')",
        lambda bucket: bucket.endpoint is None or bucket.url.startswith("s3://"),
        "endpoint is supported for s3:// only; leave endpoint out",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        SPEC,
        "checkpoint.scratch",
        "!has(self.checkpoint) || !has(self.checkpoint.scratch) || self.training.sharding == 'none'",
        lambda spec: spec.checkpoint.scratch is None or spec.training.sharding is Sharding.NONE,
        "scratch stores complete checkpoints, and with sharding no node has one; leave scratch out",
        FieldErrorReason.FORBIDDEN,
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
        "steps and seconds exclude each other; leave steps out, leave seconds out, or leave both out for an automatic "
        "interval",
        FieldErrorReason.FORBIDDEN,
    ),
)

_START = (
    Rule(
        START,
        "",
        "[has(self.job), has(self.path), has(self.url)].filter(given, given).size() == 1",
        lambda start: [start.job, start.path, start.url].count(None) == 2,
        "from needs exactly one of job, path and url; write one of them, e.g. from: {job: circles}",
    ),
    object_name("spec.checkpoint.from.job"),
    form(
        "spec.checkpoint.from.url",
        BUCKET_URL,
        "url is not the folder of a job in an object store; write s3://, gs:// or az:// followed by the bucket and a "
        "folder, e.g. s3://models/checkpoints/default/circles-1f0c3a2b",
    ),
    Rule(
        SPEC,
        "checkpoint.from",
        "!has(self.checkpoint) || !has(self.checkpoint.from) || has(self.training.method)",
        lambda spec: spec.checkpoint.from_ is None or spec.training.method is not None,
        "from is not supported with a script; leave from out",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        SPEC,
        "training.lora.base",
        "!has(self.training.lora) || !has(self.training.lora.base) || !has(self.checkpoint)"
        " || !has(self.checkpoint.from)",
        lambda spec: spec.training.lora is None or spec.training.lora.base is None or spec.checkpoint.from_ is None,
        "base and checkpoint.from both set the weights to start from; leave base out, or leave checkpoint.from out",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        SPEC,
        "training.textualInversion.base",
        "!has(self.training.textualInversion) || !has(self.training.textualInversion.base) || !has(self.checkpoint)"
        " || !has(self.checkpoint.from)",
        lambda spec: (
            spec.training.textual_inversion is None
            or spec.training.textual_inversion.base is None
            or spec.checkpoint.from_ is None
        ),
        "base and checkpoint.from both set the vectors to start from; leave base out, or leave checkpoint.from out",
        FieldErrorReason.FORBIDDEN,
    ),
)

_RETENTION = (
    is_duration("spec.checkpoint.maxStale"),
    Rule(
        SPEC,
        "checkpoint.keepBest",
        "!has(self.checkpoint) || !has(self.checkpoint.keepBest) || !self.checkpoint.keepBest || "
        "(has(self.training.validation) && has(self.training.validation.split))",
        lambda spec: (
            not spec.checkpoint.keep_best
            or (spec.training.validation is not None and spec.training.validation.split is not None)
        ),
        "keepBest selects by the held-out loss; write training.validation.split, or leave keepBest out",
        FieldErrorReason.FORBIDDEN,
    ),
)

_RECOVERY = (
    is_duration("spec.recovery.shrinkAfter"),
    is_duration("spec.recovery.hangTimeout"),
    is_duration("spec.recovery.spot.fallbackAfter"),
)

TARGET_URL = "^((s3|gs|az)://[^/]+(/.*)?|hub://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)$"
"""Form of the targets that are not folders."""

_PLAIN_TO = "(({0}.to.startsWith('/') ? '' : './') + {0}.to + '/').replace('//', '/').replace('/./', '/')"
"""CEL for a target in one spelling: lora, lora/ and ./lora are one folder."""


def _plain_to(to: str) -> str:
    return f"{'' if to.startswith('/') else './'}{to}/".replace("//", "/").replace("/./", "/")


_OUTPUTS = (
    Rule(
        SPEC,
        "outputs",
        f"self.outputs.all(one, self.outputs.exists_one(other, {_PLAIN_TO.format('other')} == "
        f"{_PLAIN_TO.format('one')}))",
        lambda spec: len({_plain_to(output.to) for output in spec.outputs}) == len(spec.outputs),
        "outputs has two entries with the same to, and the second would overwrite the first; write a different to for "
        "each",
    ),
    *OUTPUT_RULES,
    Rule(
        Scope("spec.outputs[].to", str),
        "",
        f"!self.contains('://') || self.matches(r'{TARGET_URL}')",
        lambda to: "://" not in to or re.fullmatch(TARGET_URL, to) is not None,
        "to is not a location that can be written to; write a folder, e.g. to: lora, a folder of a bucket, e.g. "
        "s3://models/lora, or a repository, e.g. hub://owner/name",
    ),
    Rule(
        Scope("spec.outputs[]", OutputSpec),
        "secret",
        "!has(self.secret) || self.to.contains('://')",
        lambda output: output.secret is None or "://" in output.to,
        "a folder needs no credentials; leave secret out, or write a URL to to",
    ),
    Rule(
        SPEC,
        "secrets",
        "self.secrets.all(one, self.secrets.exists_one(other, other.name == one.name))",
        lambda spec: max(Counter(secret.name for secret in spec.secrets).values(), default=1) == 1,
        "secrets contains a name twice; write each Secret once",
    ),
)

RULES: tuple[Rule[Any], ...] = (
    *_NAMES,
    *_DATA,
    *DATASET_RULES,
    *TRAINING_RULES,
    *SCRIPT_RULES,
    *_TOPOLOGY,
    *_CHECKPOINT,
    *_START,
    *_RETENTION,
    *_RECOVERY,
    *_OUTPUTS,
    *POD_RULES,
)
"""All rules, in the order of a manifest."""
