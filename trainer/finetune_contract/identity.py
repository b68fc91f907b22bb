"""Identity of what a job trains on: the commit or the hash of its base and its data, fixed by the first attempt.

The trainer records it next to the checkpoints and in each checkpoint; the heartbeat carries it into the job's status.
Torch-free; both sides import it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

MAX_INPUTS = 16
"""Most inputs of a job that are reported."""
DATASET = "dataset.source"
NUM_SHOWN = 12
"""Digits of a hash in messages."""

Digest = Annotated[str, Field(max_length=64)]


class InputIdentity(BaseModel):
    """One input of a job: a base model, a part of it, or the data set."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    field: str = Field(max_length=128, description="field of the manifest, e.g. model.base")
    location: str = Field(max_length=1024, description="location as the manifest names it")
    commit: Digest | None = Field(default=None, description="commit on the hub")
    content: Digest | None = Field(default=None, description="SHA-256 that depends on the contents only")
    samples: int | None = Field(default=None, ge=0, le=2**53, description="number of samples; data sets only")

    def merged(self, other: InputIdentity) -> InputIdentity:
        """Return this identity with the values of another one that it lacks."""
        missing = {name: value for name, value in other if value is not None and getattr(self, name) is None}
        return self.model_copy(update=missing)


def merge(identities: Iterable[InputIdentity]) -> tuple[InputIdentity, ...]:
    """Return one identity for each field, in the order of their first appearance."""
    merged: dict[str, InputIdentity] = {}
    for each in identities:
        merged[each.field] = merged[each.field].merged(each) if each.field in merged else each
    return tuple(merged.values())


def describe_change(before: InputIdentity, now: InputIdentity) -> str | None:
    """Return how an input differs from an earlier one, e.g. 'commit 1f0c -> 9e1b'; None if it is the same.

    A commit of the hub decides if both are from the hub: it fixes the contents. Otherwise the contents decide, so a
    folder may be moved. What is unknown on one side is no difference.
    """
    if before.commit is not None and now.commit is not None:
        if (before.location, before.commit) == (now.location, now.commit):
            return None
        places = f"{before.location} -> {now.location}, " if before.location != now.location else ""
        return f"{places}commit {before.commit[:NUM_SHOWN]} -> {now.commit[:NUM_SHOWN]}"
    if before.content is None or now.content is None:
        is_same = before.location == now.location or before.commit is None is now.commit
        return None if is_same else f"{before.location} -> {now.location}"
    if before.content == now.content:
        return None
    if before.samples != now.samples:
        return f"rows {before.samples} -> {now.samples}"
    return f"contents {before.content[:NUM_SHOWN]} -> {now.content[:NUM_SHOWN]}"
