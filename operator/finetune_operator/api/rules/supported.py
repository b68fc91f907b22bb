"""What the API has a field for and this version's trainer cannot do yet: one sentence each, never silently ignored.

The plan refuses such a job with the reason NotSupported, and `finetune run` before it starts anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finetune_contract.spec import Method, OutputFormat, Precision, Sharding
from finetune_operator.api.job import FineTuneJobSpec

DIFFUSERS_ONLY = frozenset({OutputFormat.DIFFUSERS})
LORA_FORMATS = frozenset({OutputFormat.DIFFUSERS, OutputFormat.KOHYA, OutputFormat.WEBUI})
OUTPUT_FORMATS = {
    Method.LORA: LORA_FORMATS,
    Method.DREAMBOOTH_LORA: LORA_FORMATS,
    Method.TEXTUAL_INVERSION: frozenset({OutputFormat.DIFFUSERS, OutputFormat.WEBUI}),
}
"""Formats of each method's output, where it has more than `DIFFUSERS_ONLY`."""
REMOTE_SCHEMES = ("s3://", "gs://", "az://", "hub://")
TABLE_FILES = (".csv", ".arrow")


@dataclass(frozen=True)
class Missing:
    """Something that the trainer lacks."""

    field: str
    asked: Callable[[FineTuneJobSpec], bool]
    sentence: str


MISSING = (
    Missing(
        "spec.training.precision",
        lambda spec: spec.training.sharding is not Sharding.NONE and spec.training.precision is Precision.FP16,
        "fp16 does not go with sharding; write bf16",
    ),
    Missing(
        "spec.training.aspectBuckets",
        lambda spec: spec.training.sharding is not Sharding.NONE and spec.training.aspect_buckets,
        "ranks would make unequal numbers of passes, which sharding forbids; leave one of them out",
    ),
    Missing(
        "spec.training.aspectBuckets",
        lambda spec: (
            spec.training.aspect_buckets
            and spec.training.dreambooth is not None
            and spec.training.dreambooth.class_prompt is not None
        ),
        "class images are squares, which go into no batch of another shape; leave aspectBuckets out, or classPrompt",
    ),
    Missing(
        "spec.dataset.source",
        lambda spec: spec.dataset.source.endswith(TABLE_FILES),
        "of single files this version reads .jsonl, .parquet and .tar; write one of these, a folder or a hub id",
    ),
    Missing(
        "spec.outputs",
        lambda spec: any(output.format not in _formats(spec) for output in spec.outputs),
        "this version writes diffusers for every method, kohya and webui for a LoRA, webui for TextualInversion; write "
        "format: diffusers",
    ),
    Missing(
        "spec.outputs",
        lambda spec: any(output.to.startswith(REMOTE_SCHEMES) for output in spec.outputs),
        "this version writes to folders only; write a folder in to",
    ),
)


def _formats(spec: FineTuneJobSpec) -> frozenset[OutputFormat]:
    method = spec.training.method
    return DIFFUSERS_ONLY if method is None else OUTPUT_FORMATS.get(method, DIFFUSERS_ONLY)


def find_missing(spec: FineTuneJobSpec) -> Iterator[str]:
    """A sentence, with the field before it, for each thing that a spec asks of the trainer in vain."""
    for missing in MISSING:
        if missing.asked(spec):
            yield f"{missing.field}: {missing.sentence}."
