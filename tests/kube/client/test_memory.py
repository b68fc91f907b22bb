"""Compacted models need less memory and are otherwise unchanged."""

from __future__ import annotations

import sys

from pydantic import BaseModel

from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.kube.client.memory import compact
from tests.plan.fake_cluster import make_job


def submodels(model: BaseModel) -> list[BaseModel]:
    values = [part for value in model.__dict__.values() for part in (value if isinstance(value, tuple) else (value,))]
    return [model, *(found for part in values if isinstance(part, BaseModel) for found in submodels(part))]


def test_compacted_model_is_equal_and_serialized_the_same() -> None:
    job = make_job(outputs=[{"format": "diffusers", "to": "/out"}])
    compacted = compact(FineTuneJob.model_validate(job.model_dump(by_alias=True)))
    assert compacted == job
    assert compacted.model_dump_json() == job.model_dump_json()
    models = submodels(compacted)
    assert len(models) > 5
    assert all(sys.getsizeof(model.model_fields_set) <= sys.getsizeof(set()) for model in models)


def test_copy_of_a_compacted_model_changes_no_other_model() -> None:
    first, second = compact(make_job()), compact(make_job())
    changed = first.model_copy(update={"status": first.status.model_copy(update={"step": 3})})
    assert changed.status.model_fields_set == {"step"}
    assert second.model_fields_set == first.model_fields_set == first.status.model_fields_set == set()
