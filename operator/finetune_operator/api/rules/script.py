"""The rules of `spec.training.script`. Part of the table in `spec`."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from pydantic.alias_generators import to_camel

from finetune_contract.script_spec import ScriptSpec
from finetune_contract.spec import TrainingSpec
from finetune_operator.api.job import FineTuneJobSpec
from finetune_operator.api.rules.forms import object_name
from finetune_operator.api.rules.rule import FieldErrorReason, Rule, Scope

SPEC = Scope("spec", FineTuneJobSpec)
TRAINING = Scope("spec.training", TrainingSpec)
SCRIPT = Scope("spec.training.script", ScriptSpec)
_FLAGS = {
    "steps": "max_train_steps",
    "epochs": "num_train_epochs",
    "batch_size": "train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "lr_scheduler": "lr_scheduler",
    "precision": "mixed_precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "resolution": "resolution",
    "random_flip": "random_flip",
    "snr_gamma": "snr_gamma",
    "noise_offset": "noise_offset",
    "seed": "seed",
    "ema": "use_ema",
    "memory_preset": "gradient_checkpointing",
}
"""Fields of `spec.training` that only methods read, and the flag of diffusers' scripts that replaces each."""


def _leaves_default(name: str) -> Rule[TrainingSpec]:
    """Return the rule that refuses a setting of methods next to a script, which would not read it."""
    field, default = to_camel(name), TrainingSpec.model_fields[name].default
    is_default = f"!has(self.{field})" if default is None else f"self.{field} == {_literal(default)}"
    return Rule(
        TRAINING,
        field,
        f"!has(self.script) || has(self.method) || {is_default}",
        lambda training: training.script is None or training.method is not None or getattr(training, name) == default,
        f"a script does not read {field}, which is a setting of methods (script.args has the flags of the script, e.g. "
        f"{_FLAGS[name]}); leave {field} out",
        FieldErrorReason.FORBIDDEN,
    )


def _literal(value: object) -> str:
    """Return a value as CEL."""
    return f"'{value.value}'" if isinstance(value, StrEnum) else json.dumps(value)


def _without_script(field: str, cel: str, holds: Callable[[FineTuneJobSpec], bool], message: str) -> Rule[Any]:
    """Return a rule for a job with a script."""
    return Rule(
        SPEC,
        field,
        f"!has(self.training.script) || {cel}",
        lambda spec: spec.training.script is None or holds(spec),
        message,
        FieldErrorReason.FORBIDDEN,
    )


SCRIPT_RULES: tuple[Rule[Any], ...] = (
    Rule(
        SCRIPT,
        "",
        "has(self.path) != has(self.configMap)",
        lambda script: (script.path is None) != (script.config_map is None),
        "script needs exactly one of path and configMap; write one of them, e.g. path: train_controlnet.py",
    ),
    Rule(
        SCRIPT,
        "image",
        "!has(self.image) || has(self.path)",
        lambda script: script.image is None or script.path is not None,
        "image contains the script, and configMap provides another one; leave image out, or write path instead of "
        "configMap",
        FieldErrorReason.FORBIDDEN,
    ),
    object_name("spec.training.script.configMap.name"),
    *(_leaves_default(name) for name in _FLAGS),
    _without_script(
        "topology.minNodes",
        "!has(self.topology) || !has(self.topology.minNodes)",
        lambda spec: spec.topology.min_nodes is None,
        "minNodes is not supported with a script, whose batches depend on the number of nodes; write nodes, and leave "
        "minNodes and maxNodes out",
    ),
    _without_script(
        "checkpoint.storage",
        "!has(self.checkpoint) || !has(self.checkpoint.storage) || !has(self.checkpoint.storage.bucket)",
        lambda spec: spec.checkpoint.storage is None or spec.checkpoint.storage.bucket is None,
        "storage bucket is not supported with a script, which writes to a folder that all pods share; write "
        "persistentVolumeClaim, hostPath or nfs",
    ),
    _without_script(
        "checkpoint.scratch",
        "!has(self.checkpoint) || !has(self.checkpoint.scratch)",
        lambda spec: spec.checkpoint.scratch is None,
        "scratch is not supported with a script, which writes to the storage directly; leave scratch out",
    ),
)
