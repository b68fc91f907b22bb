"""What people read: get, describe, the lines of a run. Golden texts lie in golden/."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from finetune_operator.api.crd import COLUMNS as CRD_COLUMNS
from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.cli.commands import get
from finetune_operator.cli.commands.describe import Place, description
from finetune_operator.cli.output import figures, story, summary
from tests.cli.samples import EVENTS, FAILED, NOW, PENDING, RUNNING, SUCCEEDED

GOLDEN = Path(__file__).parent / "golden"
PLACE = Place("/state/storage/default/circles-1f0c3a2b", "process 4711")
NOWHERE = Place("/state/storage/default/x", "<none>")

ALL = [PENDING, RUNNING, FAILED, SUCCEEDED]

TEXTS: dict[str, Callable[[], str]] = {
    "get.txt": lambda: get.table(ALL, NOW),
    "get-wide.txt": lambda: get.table(ALL, NOW, wide=True),
    "describe-pending.txt": lambda: description(PENDING, [], NOWHERE, NOW),
    "describe-running.txt": lambda: description(RUNNING, EVENTS, PLACE, NOW),
    "describe-failed.txt": lambda: description(FAILED, [], NOWHERE, NOW),
    "describe-succeeded.txt": lambda: description(SUCCEEDED, [], NOWHERE, NOW),
}


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times are shown in the local time zone."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("utc")
@pytest.mark.parametrize("name", TEXTS)
def test_golden(name: str) -> None:
    """FINETUNE_WRITE_GOLDEN=1 writes them anew; the difference is for a person to read."""
    path = GOLDEN / name
    if os.environ.get("FINETUNE_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(TEXTS[name]())
    assert TEXTS[name]() == path.read_text()


def test_the_columns_are_those_of_kubectl() -> None:
    ours = [name for name, _ in get.COLUMNS + get.WIDE]
    assert ours == ["NAME", *(name.upper() for name, *_ in CRD_COLUMNS)]


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
def test_ages_are_kubectls(seconds: float, text: str) -> None:
    assert figures.age(NOW - timedelta(seconds=seconds), NOW) == text


def test_story_of_a_loss() -> None:
    old = RUNNING.status.model_copy(update={"attempts": RUNNING.status.attempts[:0], "warnings": ()})
    lines = list(story.happened(old, RUNNING.status))
    assert lines[0].startswith("attempt 1 ended at step 67 because of rank 1 (circles-a1-n1 on local-1)")
    assert lines[0].endswith("It counts as a preemption.")
    assert lines[1:] == [
        "attempt 2 begins",
        "attempt 2 goes on at step 60",
        "warning: checkpoint step-60-a1 is passed over: unet.safetensors is missing",
    ]
    assert list(story.happened(RUNNING.status, RUNNING.status)) == []


def test_progress_in_a_line() -> None:
    assert story.progress(RUNNING.status) == "step 130/200 (65%), loss 0.0731, 4.48 images/s, ETA 4m10s"
    assert story.progress(FineTuneJobStatus(step=1)) == "step 1"


def test_committed_once() -> None:
    before = RUNNING.status.model_copy(update={"last_checkpoint": None})
    assert list(story.committed(before, RUNNING.status)) == ["checkpoint of step 120 committed (3.3 MiB)"]
    assert list(story.committed(RUNNING.status, RUNNING.status)) == []


def test_first_and_last_line() -> None:
    assert summary.headline(RUNNING, Path("/state")) == (
        "circles: LoRA on 2 nodes of 1 rank (cpu), going on from step 120; state in /state"
    )
    assert summary.end(SUCCEEDED, "/out/stripes", Path("job.yaml"), NOW) == (
        "stripes Succeeded in 9m: 200/200 steps, 0 restarts (0 preemptions, 0 failures), 0 steps lost; "
        "outputs in /out/stripes"
    )
    assert summary.end(FAILED, "", Path("job.yaml"), NOW).splitlines()[1] == "Its logs: finetune logs squares"
    suspended = RUNNING.model_copy(update={"status": RUNNING.status.model_copy(update={"phase": "Suspended"})})
    assert summary.end(suspended, "", Path("job.yaml"), NOW) == (
        "circles is suspended at step 120, which is saved; the same command goes on: finetune run job.yaml"
    )


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert figures.size(num_bytes) == text
