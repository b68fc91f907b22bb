"""The output for users: get, describe, and the lines of a run. The golden texts are in golden/."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from finetune_contract.phase import Phase
from finetune_operator.api.crd import COLUMNS as CRD_COLUMNS
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import Bottleneck, FineTuneJobStatus, PerformanceStatus, TimeShares
from finetune_operator.cli.commands import get
from finetune_operator.cli.commands.describe import LocalDetails, format_description
from finetune_operator.cli.output import changes, formatting, summary
from finetune_operator.plan.model.explain import explain_end
from tests.cli.samples import EVENTS, FAILED, NOW, PENDING, RUNNING, SUCCEEDED

GOLDEN = Path(__file__).parent / "golden"
RUNNING_DETAILS = LocalDetails("/state/storage/default/circles-1f0c3a2b", "process 4711")
IDLE_DETAILS = LocalDetails("/state/storage/default/x", "<none>")

ALL = [PENDING, RUNNING, FAILED, SUCCEEDED]

TEXTS: dict[str, Callable[[], str]] = {
    "get.txt": lambda: get.format_table(ALL, NOW),
    "get-wide.txt": lambda: get.format_table(ALL, NOW, wide=True),
    "describe-pending.txt": lambda: format_description(PENDING, [], IDLE_DETAILS, NOW),
    "describe-running.txt": lambda: format_description(RUNNING, EVENTS, RUNNING_DETAILS, NOW),
    "describe-failed.txt": lambda: format_description(FAILED, [], IDLE_DETAILS, NOW),
    "describe-succeeded.txt": lambda: format_description(SUCCEEDED, [], IDLE_DETAILS, NOW),
}


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the time zone, because times are shown in local time."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("utc")
@pytest.mark.parametrize("name", TEXTS)
def test_golden(name: str) -> None:
    """FINETUNE_WRITE_GOLDEN=1 writes the files again. Read the difference before you commit it."""
    path = GOLDEN / name
    if os.environ.get("FINETUNE_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(TEXTS[name]())
    assert TEXTS[name]() == path.read_text()


def test_columns_equal_those_of_kubectl() -> None:
    names = [name for name, _ in get.COLUMNS + get.WIDE]
    assert names == ["NAME", *(name.upper() for name, *_ in CRD_COLUMNS)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "<invalid>"),
        (-1, "0s"),
        (0, "0s"),
        (119.9, "119s"),
        (120, "2m"),
        (250, "4m10s"),
        (600, "10m"),
        (3 * 3600 - 1, "179m"),
        (3 * 3600, "3h"),
        (7 * 3600 + 300, "7h5m"),
        (8 * 3600 + 300, "8h"),
        (47 * 3600, "47h"),
        (76 * 3600, "3d4h"),
        (15 * 86400, "15d"),
        (729 * 86400, "729d"),
        (733 * 86400, "2y3d"),
        (9 * 365 * 86400 + 86400, "9y"),
    ],
)
def test_age_has_the_format_of_kubectl(seconds: float, text: str) -> None:
    assert formatting.format_age(NOW - timedelta(seconds=seconds), NOW) == text


def test_changes_after_a_lost_pod() -> None:
    old = RUNNING.status.model_copy(update={"attempts": RUNNING.status.attempts[:0], "warnings": ()})
    lines = list(changes.describe_changes(old, RUNNING.status))
    assert lines[0].startswith("attempt 1 ended at step 67 because of rank 1 (circles-a1-n1 on local-1)")
    assert lines[0].endswith("It counts as a preemption.")
    assert lines[1:] == [
        "attempt 2 begins",
        "attempt 2 resumes from step 60",
        "warning: checkpoint step-60-a1 is skipped: unet.safetensors is missing",
    ]
    assert list(changes.describe_changes(RUNNING.status, RUNNING.status)) == []


def test_back_off_line_does_not_repeat_the_reason_of_the_end() -> None:
    why = explain_end(FAILED.status.attempts[-1])
    changed = {
        "phase": Phase.RECOVERING,
        "reason": Reason.BACK_OFF,
        "message": f"{why} The next attempt begins at 12:00:05 UTC.",
    }
    lines = list(changes.describe_changes(FAILED.status, FAILED.status.model_copy(update=changed)))
    assert lines == ["Recovering: The next attempt begins at 12:00:05 UTC."]


def test_progress_line() -> None:
    assert changes.format_progress(RUNNING.status) == "step 130/200 (65%), loss 0.0731, 4.48 images/s, ETA 4m10s"
    assert changes.format_progress(FineTuneJobStatus(step=1)) == "step 1"


def test_a_commit_is_described_once() -> None:
    before = RUNNING.status.model_copy(update={"last_checkpoint": None})
    assert list(changes.describe_commit(before, RUNNING.status)) == ["checkpoint of step 120 committed (3.3 MiB)"]
    assert list(changes.describe_commit(RUNNING.status, RUNNING.status)) == []


def test_headline_and_end() -> None:
    assert summary.format_headline(RUNNING, Path("/state")) == (
        "circles: LoRA on 2 nodes with 1 rank each (cpu), resuming from step 120; state in /state"
    )
    assert summary.format_end(SUCCEEDED, "/out/stripes", Path("job.yaml"), NOW) == (
        "stripes Succeeded in 9m: 200/200 steps, 0 restarts (0 preemptions, 0 failures), 0 steps lost; "
        "outputs in /out/stripes"
    )
    assert (
        summary.format_end(FAILED, "", Path("job.yaml"), NOW).splitlines()[1] == "See its logs: finetune logs squares"
    )
    suspended = RUNNING.model_copy(update={"status": RUNNING.status.model_copy(update={"phase": "Suspended"})})
    assert summary.format_end(suspended, "", Path("job.yaml"), NOW) == (
        "circles is suspended at step 120, with the state saved; to resume: finetune run job.yaml"
    )


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")]
)
def test_size_has_a_binary_unit(num_bytes: int, text: str) -> None:
    assert formatting.format_size(num_bytes) == text


def test_speed_of_a_gpu_job_is_described() -> None:
    advice = ("host-bound: cudaGraphs is off because the manifest says so; write training.cudaGraphs: auto", "second")
    performance = PerformanceStatus(
        share_of_peak=0.116,
        teraflops=115,
        utilization=0.4,
        memory_allocated_bytes=26 * 2**30,
        memory_reserved_bytes=30 * 2**30,
        memory_total_bytes=80 * 2**30,
        time_shares=TimeShares(compute=0.35, host=0.65),
        bound_by=Bottleneck.HOST,
        advice=advice,
    )
    status = RUNNING.status.model_copy(update={"performance": performance})
    text = format_description(RUNNING.model_copy(update={"status": status}), [], RUNNING_DETAILS, NOW)
    lines = [line.strip() for line in text.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("Share of peak"))
    found = [" ".join(line.split()) for line in lines[start : start + 7]]
    assert found == [
        "Share of peak: 11.6% (115 TFLOP/s per device)",
        "Utilization: 40%",
        "Memory: 26.0 GiB allocated, 30.0 GiB reserved, of 80.0 GiB",
        "Time: compute 35%, host 65%",
        "Bound by: Host",
        f"Advice: {advice[0]}",
        "second",
    ]
