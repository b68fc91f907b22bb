"""Names, durations, conditions and reasons."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api import conditions, duration, names, reasons, reference

LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1h0m1s", 3601), ("100h", 360_000)]
)
def test_durations_are_parsed(text: str, seconds: int) -> None:
    assert duration.parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "10", "10 m", "1.5h", "30m1h", "-5m", "1d", "5M", "10m\n"])
def test_invalid_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write e\.g\. 90s, 10m or 1h30m"):
        duration.parse_seconds(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"),
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m"),
        (250, "4m10s"),
        (3600, "1h"),
        (5400, "1h30m"),
        (86_399, "1d"),
        (93_600, "1d2h"),
    ],
)
def test_durations_are_formatted(seconds: float, text: str) -> None:
    assert duration.format_seconds(seconds) == text


@given(st.floats(1, timedelta(hours=23).total_seconds()))
def test_formatted_durations_are_parsed_back_approximately(seconds: float) -> None:
    assert duration.parse_seconds(duration.format_seconds(seconds)) == pytest.approx(seconds, rel=0.01, abs=0.5)


def test_children_of_the_longest_job_name_are_dns_labels() -> None:
    job = "c" * names.MAX_JOB_NAME
    pod = names.pod_name(job, names.MAX_ATTEMPT, names.MAX_NODES - 1)
    assert len(pod) == names.MAX_LABEL
    for name in (pod, names.service_name(job), names.config_name(job)):
        assert LABEL.fullmatch(name)
        assert len(name) <= names.MAX_LABEL


def test_names() -> None:
    assert names.pod_name("circles", 2, 0) == "circles-a2-n0"
    assert names.pod_host("circles", 2, 0, "default") == "circles-a2-n0.circles.default.svc"
    assert names.config_name("circles") == "circles-run"


def test_every_reason_and_condition_is_documented() -> None:
    assert set(reasons.REASONS) == set(reasons.Reason)
    assert set(conditions.CONDITIONS) == set(conditions.ConditionType)
    for doc in reasons.REASONS.values():
        assert doc.meaning.endswith(".")
        assert doc.remedy.endswith(".")


def test_only_failures_are_final() -> None:
    assert all(doc.counts_as is reasons.CountsAs.FAILURE for doc in reasons.REASONS.values() if doc.final)


def test_reference_contains_every_reason() -> None:
    text = reference.render_reasons()
    assert all(f"| `{name}` |" in text for name in (*reasons.Reason, *conditions.ConditionType))


@pytest.mark.parametrize("name", [*reasons.Reason, *conditions.ConditionType])
def test_reasons_have_the_form_that_kubernetes_requires(name: str) -> None:
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", name)
