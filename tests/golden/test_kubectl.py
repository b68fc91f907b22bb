"""What a user sees: `kubectl get ftj -o wide` and `kubectl describe ftj`, for a job in every phase, kept as text.

The statuses are the plan's (see `scenes`), they are stored by a real API server, and printed by a real kubectl.
After a change of the status, its columns or its words, write the texts anew and read the difference as a user would:

    FINETUNE_WRITE_GOLDEN=1 pytest tests/golden
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from finetune_contract.phase import Phase
from finetune_operator.api import crd, yaml_text
from finetune_operator.api.job import API_VERSION, KIND, FineTuneJobStatus
from finetune_operator.cluster.kube.client.events import build_event
from testing.controlplane.api import ApiError
from testing.controlplane.server import ControlPlane
from tests.golden.scenes import EXPECTED_REASONS, SCENES, Story

TEXTS = Path(__file__).parent
JOBS = "/apis/{}/namespaces/{}/finetunejobs"
AGE = "<age>"
VOLATILE = {
    r"(  Creation Timestamp:  ).*": r"\1<time>",
    r"(  Resource Version:    ).*": r"\1<version>",
    r"(  UID:                 ).*": r"\1<uid>",
}
"""Lines of `kubectl describe` that differ from run to run."""


@pytest.fixture(scope="session")
def definition(control_plane: ControlPlane) -> None:
    """The API server knows FineTuneJobs."""
    control_plane.kubectl("apply", "--server-side", "-f", "-", stdin=crd.render())
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", f"crd/{crd.NAME}")


@pytest.mark.usefixtures("definition")
@pytest.mark.parametrize("scene", SCENES)
def test_what_kubectl_prints(control_plane: ControlPlane, namespace: str, scene: str) -> None:
    story = SCENES[scene]()
    store(control_plane, namespace, story)
    wide = control_plane.kubectl("get", "ftj", "-n", namespace, "-o", "wide")
    described = control_plane.kubectl("describe", "ftj", "-n", namespace)
    text = (
        f"$ kubectl get ftj -o wide\n{steady_table(wide)}\n$ kubectl describe ftj circles\n{steady(described, story)}"
    )
    text = text.replace(namespace, "default")
    path = TEXTS / f"{scene}.txt"
    if os.environ.get("FINETUNE_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("scene", SCENES)
def test_each_scene_is_of_its_phase(scene: str) -> None:
    status = SCENES[scene]().job.status
    assert status.phase is not None
    assert status.reason == EXPECTED_REASONS[scene]
    # A job that is being suspended keeps its phase until its pods are gone.
    name = "running" if scene == "suspending" else scene
    assert name.startswith(status.phase.value.lower())


def test_there_is_a_scene_of_every_phase_that_the_plan_knows() -> None:
    shown = {SCENES[scene]().job.status.phase for scene in SCENES}
    assert shown == set(Phase)


@pytest.mark.parametrize("scene", SCENES)
def test_no_figure_has_more_digits_than_a_person_reads(scene: str) -> None:
    status = SCENES[scene]().job.status
    for figure in (status.loss, status.images_per_second, status.goodput):
        assert figure is None or len(re.sub(r"^0\.0*|\.", "", f"{figure}")) <= 4


def test_no_text_without_its_scene() -> None:
    assert {path.stem for path in TEXTS.glob("*.txt")} == SCENES.keys()


def store(control_plane: ControlPlane, namespace: str, story: Story) -> None:
    """Store a job with its status, and its events, as the operator does."""
    api, path = control_plane.api, JOBS.format(API_VERSION, namespace)
    spec = story.job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    metadata = {"name": "circles", "labels": {"team": "art"}}
    made = api.create(path, {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec})
    body = {"status": document(story.job.status)}
    api.patch(f"{path}/circles/status", body)
    for now, job, event in story.told:
        meta = job.metadata.model_copy(update={"namespace": namespace, "uid": made["metadata"]["uid"]})
        sent = build_event(job.model_copy(update={"metadata": meta}), event, now, "operator-0")
        root = "/api/v1" if sent["apiVersion"] == "v1" else f"/apis/{sent['apiVersion']}"
        try:
            api.create(f"{root}/namespaces/{namespace}/events", sent)
        except ApiError as error:
            # What was told before is told once.
            assert error.reason == "AlreadyExists"


def document(status: FineTuneJobStatus) -> dict[str, Any]:
    written: dict[str, Any] = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert yaml_text.load(yaml_text.dump(written)) == written
    return written


def steady(described: str, story: Story) -> str:
    """A description without what differs from run to run."""
    for pattern, replacement in VOLATILE.items():
        described = re.sub(pattern, replacement, described)
    head, title, events = described.partition("Events:\n")
    rows = [re.split(r" {2,}", row.strip(), maxsplit=4) for row in events.splitlines()]
    # Several of a second are told in any order.
    order = [event.message for _, _, event in story.told]
    rows[2:] = sorted(rows[2:], key=lambda row: order.index(row[4]))
    for row in rows[2:]:
        row[2] = AGE
    return head + title + in_line(rows, "  ")


def steady_table(table: str) -> str:
    """A table with its ages taken out and its columns put in line again."""
    header, *rows = table.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", header)]
    cells = [
        [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        for line in (header, *rows)
    ]
    for row in cells[1:]:
        for index, name in enumerate(cells[0]):
            if name in ("AGE", "CHECKPOINT") and row[index]:
                row[index] = AGE
    return in_line(cells)


def in_line(cells: list[list[str]], indent: str = "") -> str:
    """Cells as a table."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (indent + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines) + "\n"
