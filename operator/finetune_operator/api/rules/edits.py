"""Fields of a job's spec that may change once its first attempt has begun: one table for the CRD and for Python.

All attempts read the same ConfigMap, which is written once, and each attempt continues from the checkpoints of the one
before. So the fields that the trainer and its checkpoints depend on are fixed; fields that only the operator or the
next pods read may change. Before the first attempt every field may change: a refused job is corrected and applied
again.

`status.attempt` is raised with the resource version, before anything of the attempt is created. So no edit can happen
in between.

The API server evaluates all rules on every write, writes of the status included; comparing complete specs there would
cost more than the rest of the write. A write that changes `status.message` can only be a write of the status: an edit
of the spec keeps the stored status, even if it contains another one, and a write of the status keeps the stored spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.rules.rule import FieldErrorReason

REASON = FieldErrorReason.FORBIDDEN
_BEFORE_THE_FIRST_ATTEMPT = "oldSelf.?status.?attempt.orValue(0) == 0"
_WRITES_STATUS = (
    "has(self.status.message) && has(oldSelf.status.message) && self.status.message != oldSelf.status.message"
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

    @property
    def name(self) -> str:
        """Name of the field itself, e.g. 'nodes'."""
        return self.path.rpartition(".")[2]

    @property
    def message(self) -> str:
        """Message: the field, the reason for the refusal and the remedy."""
        when = "after the job is created" if self.always else "after the first attempt has begun"
        return f"{self.name} cannot change {when}: {self.why}; {_ADVICE}"

    @property
    def cel(self) -> str:
        """The transition rule, for the root: only there are spec and status both accessible."""
        new, old = f"self.{self.path}", f"oldSelf.{self.path}"
        is_unchanged = f"{new} == {old}"
        if self.optional:
            is_unchanged = f"has({new}) == has({old}) && (!has({new}) || {is_unchanged})"
        if self.always:
            return is_unchanged
        return f"{_BEFORE_THE_FIRST_ATTEMPT} || {_WRITES_STATUS} || {is_unchanged}"


_GLOBAL_BATCH = "the global batch depends on it"

FIXED = (
    FixedField("spec.model", "the checkpoints belong to the old model"),
    FixedField("spec.dataset", "the checkpoints contain a position in the old data set"),
    FixedField("spec.training", "the checkpoints depend on the old settings"),
    FixedField("spec.topology.accelerator", "the global batch was chosen for the old one"),
    FixedField("spec.topology.nodes", _GLOBAL_BATCH, optional=True),
    FixedField("spec.topology.maxNodes", _GLOBAL_BATCH, optional=True),
    FixedField("spec.topology.processesPerNode", _GLOBAL_BATCH),
    FixedField("spec.topology.cpu", "all attempts must sum gradients in the same way"),
    FixedField("spec.checkpoint", "all attempts share the checkpoints of the first"),
    FixedField("spec.outputs", "the trainer received the list of outputs when the job began"),
    FixedField("spec.queueName", "the old queue has admitted the job", optional=True),
    FixedField("spec.managedBy", "two controllers would manage the job", always=True),
)
"""Fixed fields, in the order of a manifest."""

AT_ONCE = "immediately"
NEXT_ATTEMPT = "with the next attempt"

CHANGEABLE = {
    "spec.topology.minNodes": AT_ONCE,
    "spec.topology.resources": NEXT_ATTEMPT,
    "spec.recovery.maxFailures": AT_ONCE,
    "spec.recovery.manualRetries": AT_ONCE,
    "spec.recovery.spot": NEXT_ATTEMPT,
    "spec.recovery.shrinkAfter": AT_ONCE,
    "spec.recovery.hangTimeout": AT_ONCE,
    "spec.recovery.noticeSeconds": NEXT_ATTEMPT,
    "spec.suspend": AT_ONCE,
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
    has_begun = old.status.attempt > 0
    return [
        fixed for fixed in FIXED if (fixed.always or has_begun) and _at(before, fixed.path) != _at(after, fixed.path)
    ]


def fixed_part(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec, as a document, without the fields that may change at any time."""
    return _without_changeable(spec, "spec")


def _without_changeable(part: Mapping[str, Any], path: str) -> dict[str, Any]:
    kept = {}
    for name, value in part.items():
        below = f"{path}.{name}"
        if below not in CHANGEABLE:
            kept[name] = _without_changeable(value, below) if isinstance(value, Mapping) else value
    return kept


def _dump(job: FineTuneJob) -> dict[str, Any]:
    return {"spec": job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)}


def _at(document: Mapping[str, Any], path: str) -> Any:
    value: Any = document
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
