"""Models that are kept by the thousand are smaller, and otherwise what they were."""

from __future__ import annotations

import sys

from pydantic import BaseModel

from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.kube.watch.memory import lean
from tests.plan.harness import make_job


def parts(model: BaseModel) -> list[BaseModel]:
    inner = [part for value in model.__dict__.values() for part in (value if isinstance(value, tuple) else (value,))]
    return [model, *(found for part in inner if isinstance(part, BaseModel) for found in parts(part))]


def test_a_lean_model_is_equal_and_written_alike() -> None:
    job = make_job(outputs=[{"format": "diffusers", "to": "/out"}])
    thin = lean(FineTuneJob.model_validate(job.model_dump(by_alias=True)))
    assert thin == job
    assert thin.model_dump_json() == job.model_dump_json()
    assert all(not sys.getsizeof(part.model_fields_set) > sys.getsizeof(set()) for part in parts(thin))
    assert len(parts(thin)) > 5


def test_a_copy_of_a_lean_model_changes_no_other() -> None:
    one, other = lean(make_job()), lean(make_job())
    changed = one.model_copy(update={"status": one.status.model_copy(update={"step": 3})})
    assert changed.status.model_fields_set == {"step"}
    assert other.model_fields_set == one.model_fields_set == one.status.model_fields_set == set()
