"""What of a job's spec may change once its first attempt has begun: one table for the CRD and for Python.

The trainer is told of the job once, by the ConfigMap that all attempts read, and its checkpoints go on from one
attempt to the next. So what they depend on stays; what only the operator reads, or only the next pods, may change.
Before the first attempt everything may: a job that was refused is mended and applied again.

`status.attempt` rises with the resource version, before anything of the attempt exists. So no edit can slip in between.

The API server looks at all rules in every write, those of the status included: comparing whole specs there would cost
more than all the rest of the write. A write that changes the message of the status can only be one of the status, for
an edit keeps the stored status, whatever it says of it; and a write of the status keeps the stored spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.rules.rule import Cause

CAUSE = Cause.FORBIDDEN
_BEFORE_THE_FIRST_ATTEMPT = "oldSelf.?status.?attempt.orValue(0) == 0"
_WRITES_STATUS = (
    "has(self.status.message) && has(oldSelf.status.message) && self.status.message != oldSelf.status.message"
)
_ELSE = "write the change into a new job with another name"


@dataclass(frozen=True)
class Fixed:
    """A part of the spec that stays as it was."""

    path: str
    why: str
    optional: bool = False
    """Whether it may be left out and has no default."""
    always: bool = False
    """Whether it stays from the job's creation on, and not only from its first attempt on."""

    @property
    def name(self) -> str:
        """The field's own name, e.g. 'nodes'."""
        return self.path.rpartition(".")[2]

    @property
    def sentence(self) -> str:
        """Why the edit is refused and what to do instead; names the field."""
        when = "once the job exists" if self.always else "once the job has begun"
        return f"{self.name} cannot change {when}: {self.why}; {_ELSE}"

    @property
    def cel(self) -> str:
        """The transition rule, at the root: only there is the status in sight."""
        new, old = f"self.{self.path}", f"oldSelf.{self.path}"
        stays = f"{new} == {old}"
        if self.optional:
            stays = f"has({new}) == has({old}) && (!has({new}) || {stays})"
        if self.always:
            return stays
        return f"{_BEFORE_THE_FIRST_ATTEMPT} || {_WRITES_STATUS} || {stays}"


_GLOBAL_BATCH = "the global batch follows from it"

FIXED = (
    Fixed("spec.model", "the checkpoints are of the old model"),
    Fixed("spec.dataset", "the checkpoints hold a place in the old data"),
    Fixed("spec.training", "the checkpoints go on with the old settings"),
    Fixed("spec.topology.accelerator", "the global batch was chosen for the old one"),
    Fixed("spec.topology.nodes", _GLOBAL_BATCH, optional=True),
    Fixed("spec.topology.maxNodes", _GLOBAL_BATCH, optional=True),
    Fixed("spec.topology.processesPerNode", _GLOBAL_BATCH),
    Fixed("spec.topology.cpu", "all attempts add up gradients in the same way"),
    Fixed("spec.checkpoint", "all attempts share the checkpoints of the first"),
    Fixed("spec.outputs", "the trainer was told where to write when the job began"),
    Fixed("spec.queueName", "the old queue has admitted it", optional=True),
    Fixed("spec.managedBy", "two controllers would take care of it", always=True),
)
"""What stays, in the order in which a manifest is written."""

AT_ONCE = "at once"
NEXT_ATTEMPT = "with the next attempt"

CHANGEABLE = {
    "spec.topology.minNodes": AT_ONCE,
    "spec.topology.resources": NEXT_ATTEMPT,
    "spec.recovery.maxFailures": AT_ONCE,
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
"""What may change at any time, and when the change takes effect."""


def forbidden_edits(old: FineTuneJob, new: FineTuneJob) -> list[Fixed]:
    """What changes between a stored job and its edit and may not. The status that counts is the stored one's."""
    before, after = _dump(old), _dump(new)
    begun = old.status.attempt > 0
    return [fixed for fixed in FIXED if (fixed.always or begun) and _at(before, fixed.path) != _at(after, fixed.path)]


def fixed_part(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A spec, as a document, without what may change at any time."""
    return _without(spec, "spec")


def _without(part: Mapping[str, Any], path: str) -> dict[str, Any]:
    kept = {}
    for name, value in part.items():
        below = f"{path}.{name}"
        if below not in CHANGEABLE:
            kept[name] = _without(value, below) if isinstance(value, Mapping) else value
    return kept


def _dump(job: FineTuneJob) -> dict[str, Any]:
    return {"spec": job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)}


def _at(document: Mapping[str, Any], path: str) -> Any:
    value: Any = document
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
