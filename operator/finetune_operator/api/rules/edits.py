"""Fields of a job's spec that may change once its first attempt has begun: one table for the CRD and for Python.

All attempts read the same ConfigMap, which is written once, and each attempt continues from the checkpoints of the one
before. So the fields that the trainer and its checkpoints depend on are fixed; fields that only the operator or the
next pods read may change. Each attempt also receives the length of the training and the outputs (`RunTarget`): they
may change until the outputs are written, and the length can only be raised. Before the first attempt every field may
change: a refused job is corrected and applied again.

`status.attempt` is raised with the resource version, before anything of the attempt is created. So no edit can happen
in between.

A write that changes `status.writes` can only be a write of the status: an edit of the spec keeps the stored status,
even if it contains another one, and a write of the status keeps the stored spec. The rules skip such a write
(`combined`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.alias_generators import to_camel

from finetune_contract.heartbeat import OutputState
from finetune_contract.run_spec import RunTarget, SpeedSettings
from finetune_contract.spec import Precision, TrainingSpec
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.rules.rule import FieldErrorReason

REASON = FieldErrorReason.FORBIDDEN
BEFORE_THE_FIRST_ATTEMPT = "oldSelf.?status.?attempt.orValue(0) == 0"
WRITES_STATUS = "self.?status.?writes != oldSelf.?status.?writes"
_UNWRITTEN = (
    "(!has(oldSelf.status) || !has(oldSelf.status.outputs)"
    " || oldSelf.status.outputs.all(one, has(one.state) && one.state != 'Written'))"
)
_ADVICE = "write the change into a new job with another name"


@dataclass(frozen=True)
class FixedField:
    """A part of the spec that must not change."""

    path: str
    why: str
    optional: bool = False
    """Whether it has no default and may be left out."""
    always: bool = False
    """Whether it is fixed from the job's creation, not only from its first attempt."""
    parts: tuple[tuple[str, bool], ...] = ()
    """Names of the fields below it that are fixed, and whether each is optional; empty: all of them."""
    until_written: bool = False
    """Whether it is fixed only when the outputs are written."""
    is_raisable: bool = False
    """Whether a higher number is allowed until the outputs are written."""

    @property
    def name(self) -> str:
        """Name of the field itself, e.g. 'nodes'."""
        return self.path.rpartition(".")[2]

    @property
    def message(self) -> str:
        """Message: the field, the reason for the refusal and the remedy."""
        return f"{self.problem}; {_ADVICE}"

    @property
    def problem(self) -> str:
        """The field and the reason for the refusal."""
        when = "after the job is created" if self.always else "after the first attempt has begun"
        if self.until_written:
            when = "after the outputs are written"
        elif self.is_raisable:
            when += ", unless it is raised before the outputs are written"
        return f"{self.name} cannot change {when}: {self.why}"

    @property
    def cel(self) -> str:
        """The condition on both versions, for the root: only there are spec and status both accessible."""
        is_unchanged = " && ".join(
            _is_unchanged(f"{self.path}.{name}", is_optional) for name, is_optional in self.parts
        ) or _is_unchanged(self.path, self.optional)
        allowed = [is_unchanged]
        if self.until_written:
            allowed.append(_UNWRITTEN)
        if self.is_raisable:
            new, old = f"self.{self.path}", f"oldSelf.{self.path}"
            allowed.append(f"{_UNWRITTEN} && has({new}) && has({old}) && {new} > {old}")
        return " || ".join(allowed)

    def permits(self, before: Mapping[str, Any], after: Mapping[str, Any], *, is_written: bool) -> bool:
        """Return whether an edit keeps the field, or changes it as allowed after the first attempt has begun.

        Args:
            before: the stored job as a document.
            after: the edited one.
            is_written: whether the job's outputs are written.
        """
        paths = [f"{self.path}.{name}" for name, _ in self.parts] or [self.path]
        if all(_at(before, path) == _at(after, path) for path in paths):
            return True
        if self.is_raisable and not is_written:
            old, new = _at(before, self.path), _at(after, self.path)
            return old is not None and new is not None and new > old
        return self.until_written and not is_written


def _is_unchanged(path: str, is_optional: bool) -> str:
    """Return the CEL expression that a field did not change."""
    new, old = f"self.{path}", f"oldSelf.{path}"
    if is_optional:
        return f"has({new}) == has({old}) && (!has({new}) || {new} == {old})"
    return f"{new} == {old}"


_LENGTH = "the checkpoints may contain more steps"
_SETTINGS = tuple(
    (to_camel(name), field.default is None)
    for name, field in TrainingSpec.model_fields.items()
    if name not in RunTarget.model_fields and name not in SpeedSettings.model_fields
)
"""The fields of `spec.training` except its length and those that only change its speed, each with whether it is
optional."""
_GLOBAL_BATCH = "the global batch depends on it"

FIXED = (
    FixedField("spec.model", "the checkpoints belong to the old model"),
    FixedField("spec.dataset", "the checkpoints contain a position in the old data set"),
    FixedField("spec.training", "the checkpoints depend on the old settings", parts=_SETTINGS),
    FixedField("spec.training.steps", _LENGTH, optional=True, is_raisable=True),
    FixedField("spec.training.epochs", _LENGTH, optional=True, is_raisable=True),
    FixedField("spec.topology.accelerator", "the global batch was chosen for the old one"),
    FixedField("spec.topology.nodes", _GLOBAL_BATCH, optional=True),
    FixedField("spec.topology.maxNodes", _GLOBAL_BATCH, optional=True),
    FixedField("spec.topology.processesPerNode", _GLOBAL_BATCH),
    FixedField("spec.topology.cpu", "all attempts must sum gradients in the same way"),
    FixedField("spec.checkpoint", "all attempts share the checkpoints of the first"),
    FixedField("spec.outputs", "the job no longer writes", until_written=True),
    FixedField("spec.queueName", "the old queue has admitted the job", optional=True),
    FixedField("spec.managedBy", "two controllers would manage the job", always=True),
)
"""Fixed fields, in the order of a manifest."""

AT_ONCE = "immediately"
NEXT_ATTEMPT = "with the next attempt"

NEXT_PODS = "in pods that are created later"

IN_PLACE = "after a save, when the ranks start again in the same pods (`TargetEdited`)"
LIMITED = {"spec.training.steps": IN_PLACE, "spec.training.epochs": IN_PLACE, "spec.outputs": IN_PLACE}
"""Fixed fields that may change until the outputs are written, and when the change takes effect."""

CHANGEABLE = {
    "spec.training.cudaGraphs": NEXT_PODS,
    "spec.training.compile": NEXT_PODS,
    "spec.topology.minNodes": AT_ONCE,
    "spec.topology.resources": NEXT_ATTEMPT,
    "spec.topology.pack": NEXT_ATTEMPT,
    "spec.topology.gpuClaimTemplateName": NEXT_ATTEMPT,
    "spec.recovery.maxFailures": AT_ONCE,
    "spec.recovery.manualRetries": AT_ONCE,
    "spec.recovery.spot": NEXT_ATTEMPT,
    "spec.recovery.shrinkAfter": AT_ONCE,
    "spec.recovery.hangTimeout": AT_ONCE,
    "spec.recovery.noticeSeconds": NEXT_ATTEMPT,
    "spec.recovery.maxMemory": AT_ONCE,
    "spec.suspend": AT_ONCE,
    "spec.scheduling": NEXT_ATTEMPT,
    "spec.priorityClassName": NEXT_ATTEMPT,
    "spec.activeDeadlineSeconds": AT_ONCE,
    "spec.ttlSecondsAfterFinished": AT_ONCE,
    "spec.secrets": NEXT_ATTEMPT,
    "spec.podTemplate": NEXT_ATTEMPT,
}
"""Fields that may change at any time, and when the change takes effect."""


def forbidden_edits(old: FineTuneJob, new: FineTuneJob) -> list[FixedField]:
    """Return the fixed fields that differ between a stored job and its edit. Only the stored job's status counts."""
    before, after = _dump(old), _dump(new)
    has_begun, is_written = (
        old.status.attempt > 0,
        any(output.state is OutputState.WRITTEN for output in old.status.outputs),
    )
    return [
        fixed
        for fixed in FIXED
        if (fixed.always or has_begun) and not fixed.permits(before, after, is_written=is_written)
    ]


EARLIER_DEFAULTS: Mapping[str, Any] = {"learning_rate": 1e-4, "center_crop": False, "precision": Precision.FP32}
"""Defaults of earlier versions for fields of `spec.training` whose defaults now depend on the method or the device."""


def keep_earlier_defaults(stored: FineTuneJob, manifest: FineTuneJob) -> FineTuneJob:
    """Return a manifest with the defaults that an earlier version has stored in its job.

    Without them, the same manifest would now mean another learning rate or crop. The API server keeps stored defaults
    in the same way when a manifest is applied again.
    """
    old, new = stored.spec.training, manifest.spec.training
    kept = {
        name: default
        for name, default in EARLIER_DEFAULTS.items()
        if getattr(new, name) is None and getattr(old, name) == default
    }
    if not kept:
        return manifest
    spec = manifest.spec.model_copy(update={"training": new.model_copy(update=kept)})
    return manifest.model_copy(update={"spec": spec})


def fixed_part(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec, as a document, without the fields that may change at any time."""
    return _without_changeable(spec, "spec")


def _without_changeable(part: Mapping[str, Any], path: str) -> dict[str, Any]:
    kept = {}
    for name, value in part.items():
        below = f"{path}.{name}"
        if below not in CHANGEABLE and below not in LIMITED:
            kept[name] = _without_changeable(value, below) if isinstance(value, Mapping) else value
    return kept


def _dump(job: FineTuneJob) -> dict[str, Any]:
    return {"spec": job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)}


def _at(document: Mapping[str, Any], path: str) -> Any:
    value: Any = document
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
