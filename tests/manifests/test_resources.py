"""Kubernetes quantities."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api.quantity import parse_quantity
from finetune_operator.api.rules.forms import QUANTITY
from finetune_operator.manifests import build_pod
from finetune_operator.settings import Settings
from tests.plan.fake_cluster import make_job


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("+8", 8),
        ("500m", Decimal("0.5")),
        ("1.5", Decimal("1.5")),
        (".5Gi", 2**29),
        ("1.", 1),
        ("32Gi", 32 * 2**30),
        ("32G", 32 * 10**9),
        ("64Ki", 2**16),
        ("1k", 1000),
        ("1E", 10**18),
        ("1Ei", 2**60),
        ("1e3", 1000),
        ("1E3", 1000),
        ("12e-1", Decimal("1.2")),
        ("100n", Decimal("1e-7")),
    ],
)
def test_quantities_are_parsed(text: str, value: Decimal | int) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["", "Gi", "32GB", "-1", "1 Gi", "1K", "1e", "ten"])
def test_invalid_quantities_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a Kubernetes quantity; write"):
        parse_quantity(text)


@given(st.from_regex(QUANTITY, fullmatch=True).filter(lambda text: re.fullmatch(QUANTITY, text.strip())))
def test_quantities_that_pass_the_rules_are_parsed(text: str) -> None:
    assert parse_quantity(text.strip()) >= 0


@pytest.mark.parametrize(
    ("memory", "raised", "most", "expected"),
    [
        ("8Gi", None, "32Gi", "8Gi"),
        ("8Gi", "12288Mi", "32Gi", "12288Mi"),
        ("8Gi", "12288Mi", None, "8Gi"),
        # Later edits of the spec.
        ("16Gi", "12288Mi", "32Gi", "16Gi"),
        ("8Gi", "18432Mi", "16Gi", "16Gi"),
        (8589934592, "12288Mi", "32Gi", "12288Mi"),
    ],
)
def test_memory_grows_within_the_spec(memory: str | int, raised: str | None, most: str | None, expected: str) -> None:
    topology = {"accelerator": "cpu", "resources": {"memory": memory, "cpu": 2}}
    job = make_job(topology=topology, recovery={"maxMemory": most} if most else {})
    job = job.model_copy(update={"status": job.status.model_copy(update={"memory": raised})})
    resources = build_pod(job, 1, 0, Settings())["spec"]["containers"][0]["resources"]
    assert resources == {"limits": {"memory": expected, "cpu": "2"}, "requests": {"memory": expected, "cpu": "2"}}
