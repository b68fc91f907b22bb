"""Pods write heartbeats and the operator stores them: no number, text or list of the protocol is without a bound."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from finetune_contract.heartbeat import MAX_BEAT_BYTES, MAX_LOSS, Heartbeat, RankEnd, RankReport, RankState, Wire
from finetune_trainer.supervisor.heartbeats import fit
from tests.coordinator.test_beats import beat

FIELDS = [
    pytest.param(field, id=f"{model.__name__}.{name}")
    for model in Wire.__subclasses__()
    for name, field in model.model_fields.items()
]
INT64 = 2**63
BYTES = 8192
"""No text of the protocol is longer."""


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_has_a_bound(field: FieldInfo) -> None:
    annotated: Any = Annotated[field.annotation, "of a field", *field.metadata]
    adapter: TypeAdapter[Any] = TypeAdapter(annotated)
    for huge in (INT64, -INT64, 10**40, -(10**40), 1e308, -1e308, math.inf, -math.inf, math.nan):
        try:
            kept = adapter.validate_python(huge)
        except ValidationError:
            continue
        # Only a measured number may be this large; one that is not finite has no value.
        assert kept is None or (isinstance(kept, float) and abs(kept) <= MAX_LOSS)
    for long in ("x" * 10 * BYTES, ["x"] * 10_000, ["x" * 10 * BYTES] * 5):
        try:
            kept = adapter.validate_python(long)
        except ValidationError:
            continue
        assert len(json.dumps(kept)) <= 3 * BYTES


def long_report(rank: int) -> RankReport:
    texts = tuple(f"warning {number}: " + "é" * 900 for number in range(5))
    return RankReport(rank=rank, state=RankState.TRAINING, step=7, detail="d" * 500, warnings=texts)


def test_a_pod_with_many_ranks_and_long_texts_sends_what_the_coordinator_accepts() -> None:
    """Its numbers and states are complete; only texts are shorter."""
    ranks = tuple(long_report(rank) for rank in range(64))
    ends = tuple(RankEnd(rank=rank, exit_code=1, last_words="é" * 2000) for rank in range(64))
    full = beat().model_copy(update={"ranks": ranks, "ends": ends})
    assert len(full.to_json().encode()) > MAX_BEAT_BYTES
    sent = fit(full)
    assert len(sent.to_json().encode()) <= MAX_BEAT_BYTES
    read = Heartbeat.model_validate_json(sent.to_json())
    assert [(report.rank, report.state, report.step) for report in read.ranks] == [
        (rank, RankState.TRAINING, 7) for rank in range(64)
    ]
    assert [(end.rank, end.exit_code) for end in read.ends] == [(rank, 1) for rank in range(64)]
    assert read.ends[0].last_words


def test_an_error_that_is_over_stays_over_and_a_current_one_stays_visible() -> None:
    reports = (
        long_report(0).model_copy(update={"checkpoint_error": ""}),
        *(long_report(rank).model_copy(update={"checkpoint_error": "disk full " * 90}) for rank in range(1, 64)),
    )
    sent = fit(beat().model_copy(update={"ranks": reports}))
    assert sent.ranks[0].checkpoint_error == ""
    assert all(
        report.checkpoint_error and "disk full ".startswith(report.checkpoint_error[:10]) for report in sent.ranks[1:]
    )


def test_a_normal_heartbeat_is_sent_unchanged() -> None:
    whole = beat().model_copy(update={"ranks": (long_report(0),)})
    assert fit(whole) is whole


@pytest.mark.parametrize(
    ("text", "loss", "speed"),
    [
        ('"loss": NaN, "imagesPerSecond": Infinity', None, None),
        ('"loss": 1e38, "imagesPerSecond": 12.5', 1e38, 12.5),
    ],
)
def test_a_figure_that_is_not_finite_has_no_value(text: str, loss: float | None, speed: float | None) -> None:
    report = RankReport.model_validate_json('{"rank": 0, "state": "Training", ' + text + "}")
    assert (report.loss, report.images_per_second) == (loss, speed)
