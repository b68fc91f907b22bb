"""Rules about volumes and devices that only the pods of a cluster have."""

from __future__ import annotations

import re
from typing import Any

from finetune_operator.api.job import Accelerator, JobModelSpec
from finetune_operator.api.rules.cpu import TOPOLOGY
from finetune_operator.api.rules.forms import QUANTITY, object_name
from finetune_operator.api.rules.rule import FieldErrorReason, Rule, Scope, form
from finetune_operator.api.rules.training import SPEC

MODEL = Scope("spec.model", JobModelSpec)
MODEL_FOLDER = "/finetune/model"
GPU_RESOURCE = "nvidia.com/gpu"
MEMORY = "memory"
IN_MODEL_FOLDER = f"^{MODEL_FOLDER}(/[^/]+)*/?$"
IMAGE_REFERENCE = "^[a-zA-Z0-9][-._a-zA-Z0-9]*(:[0-9]+)?(/[-._a-zA-Z0-9]+)*(:[-._a-zA-Z0-9]+)?(@sha256:[a-f0-9]{64})?$"

POD_RULES: tuple[Rule[Any], ...] = (
    Rule(
        MODEL,
        "base",
        f"!has(self.image) || self.base.matches(r'{IN_MODEL_FOLDER}') && !(self.base + '/').contains('/../')",
        lambda model: (
            model.image is None
            or (re.fullmatch(IN_MODEL_FOLDER, model.base) is not None and "/../" not in model.base + "/")
        ),
        f"base is not in the image, which is mounted at {MODEL_FOLDER}; write base: {MODEL_FOLDER}, or a folder below "
        f"it, e.g. {MODEL_FOLDER}/sdxl, or leave image out",
    ),
    Rule(
        MODEL,
        "revision",
        "!has(self.image) || !has(self.revision)",
        lambda model: model.image is None or model.revision is None,
        "revision selects a version of the hub, and the base is in an image; leave revision out, or leave image out",
        FieldErrorReason.FORBIDDEN,
    ),
    form(
        "spec.model.image.reference",
        IMAGE_REFERENCE,
        "reference is not the reference of an image; write the registry, the name and a tag or a digest, without a "
        "scheme, e.g. registry.example.com/models/sdxl:1.0",
    ),
    object_name("spec.topology.gpuClaimTemplateName"),
    Rule(
        TOPOLOGY,
        "gpuClaimTemplateName",
        "!has(self.gpuClaimTemplateName) || self.accelerator == 'gpu'",
        lambda topology: topology.gpu_claim_template_name is None or topology.accelerator is Accelerator.GPU,
        "gpuClaimTemplateName claims GPUs, and accelerator is cpu; leave gpuClaimTemplateName out, or write "
        "accelerator: gpu",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        TOPOLOGY,
        "resources",
        f"!has(self.gpuClaimTemplateName) || !has(self.resources) || !('{GPU_RESOURCE}' in self.resources)",
        lambda topology: topology.gpu_claim_template_name is None or GPU_RESOURCE not in (topology.resources or {}),
        f"resources sets {GPU_RESOURCE}, and gpuClaimTemplateName claims the GPUs; leave {GPU_RESOURCE} out, or leave "
        "gpuClaimTemplateName out",
        FieldErrorReason.FORBIDDEN,
    ),
    form("spec.recovery.maxMemory", QUANTITY, "maxMemory is not a Kubernetes quantity; write e.g. 128Gi"),
    Rule(
        SPEC,
        "recovery.maxMemory",
        "!has(self.recovery) || !has(self.recovery.maxMemory) || has(self.topology.resources)"
        f" && '{MEMORY}' in self.topology.resources",
        lambda spec: spec.recovery.max_memory is None or MEMORY in (spec.topology.resources or {}),
        "maxMemory limits the growth of topology.resources.memory, which is missing; write topology.resources.memory, "
        "e.g. resources: {memory: 32Gi}, or leave maxMemory out",
        FieldErrorReason.REQUIRED,
    ),
)
