"""What the API has a field for and this version cannot do yet: refused with a sentence, never ignored.

The details that its trainer cannot do stand in `api.supported`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune_operator.api.job import FineTuneJobSpec
from finetune_operator.settings import Settings


@dataclass(frozen=True)
class Gap:
    """One feature that is missing: when a spec asks for it, and what to write instead."""

    asked: Callable[[FineTuneJobSpec], bool]
    sentence: str


GAPS = (
    Gap(
        lambda spec: spec.training.script is not None,
        "spec.training.script: scripts cannot be run by this version; write method: LoRA instead.",
    ),
    Gap(
        lambda spec: spec.queue_name is not None,
        "spec.queueName: queues are not supported by this version; leave it out.",
    ),
)

NO_STORAGE = (
    "spec.checkpoint.storage: the pods need a volume that they share, or a bucket; write persistentVolumeClaim, "
    "hostPath, nfs or bucket."
)


def find_unsupported(spec: FineTuneJobSpec, settings: Settings) -> list[str]:
    """A sentence for each thing that the spec asks for in vain."""
    sentences = [gap.sentence for gap in GAPS if gap.asked(spec)]
    if settings.require_storage and spec.checkpoint.storage is None:
        sentences.append(NO_STORAGE)
    return sentences
