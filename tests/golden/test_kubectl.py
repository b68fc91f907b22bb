"""Golden texts of `kubectl get ftj -o wide` and `kubectl describe ftj`, for a job in every phase.

The plan computes the statuses (see `scenes`), a real API server stores them, and a real kubectl prints them. After a
change of the status, its columns or its messages, regenerate the texts and read the difference as a user:

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
from finetune_operator.api.job import API_VERSION, KIND
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.cluster.kube.client.events import build_event
from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.definitions import await_established
from testing.controlplane.server import ControlPlane
from tests.golden.scenes import EXPECTED_REASONS, SCENES, RecordingCluster

TEXTS = Path(__file__).parent
JOBS = "/apis/{}/namespaces/{}/finetunejobs"
AGE = "<age>"
VOLATILE = {
    r"(  Creation Timestamp:  ).*": r"\1<time>",
    r"(  Resource Version:    ).*": r"\1<version>",
    r"(  UID:                 ).*": r"\1<uid>",
}
"""Lines of `kubectl describe` that differ between runs."""


@pytest.fixture(scope="session")
def definition(control_plane: ControlPlane) -> None:
    """Install the CRD of FineTuneJob."""
    control_plane.kubectl("apply", "--server-side", "-f", "-", stdin=crd.render())
    await_established(control_plane, crd.NAME)


@pytest.mark.usefixtures("definition")
@pytest.mark.parametrize("scene", SCENES)
def test_kubectl_prints_the_golden_text(control_plane: ControlPlane, namespace: str, scene: str) -> None:
    cluster = SCENES[scene]()
    store(control_plane, namespace, cluster)
    wide = control_plane.kubectl("get", "ftj", "-n", namespace, "-o", "wide")
    described = control_plane.kubectl("describe", "ftj", "-n", namespace)
    table, description = normalize_table(wide), normalize(described, cluster)
    text = f"$ kubectl get ftj -o wide\n{table}\n$ kubectl describe ftj circles\n{description}"
    text = text.replace(namespace, "default")
    path = TEXTS / f"{scene}.txt"
    if os.environ.get("FINETUNE_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("scene", SCENES)
def test_scene_has_the_phase_of_its_name(scene: str) -> None:
    status = SCENES[scene]().job.status
    assert status.phase is not None
    assert status.reason == EXPECTED_REASONS[scene]
    # A job that is being suspended keeps its phase until its pods are deleted.
    name = "running" if scene == "suspending" else scene
    assert name.startswith(status.phase.value.lower())


def test_every_phase_has_a_scene() -> None:
    shown = {SCENES[scene]().job.status.phase for scene in SCENES}
    assert shown == set(Phase)


@pytest.mark.parametrize("scene", SCENES)
def test_figures_have_at_most_four_digits(scene: str) -> None:
    status = SCENES[scene]().job.status
    for figure in (status.loss, status.images_per_second, status.goodput):
        assert figure is None or len(re.sub(r"^0\.0*|\.", "", f"{figure}")) <= 4


def test_every_golden_text_has_a_scene() -> None:
    assert {path.stem for path in TEXTS.glob("*.txt")} == SCENES.keys()


def store(control_plane: ControlPlane, namespace: str, cluster: RecordingCluster) -> None:
    """Store a job with its status and events, as the operator does."""
    api, path = control_plane.api, JOBS.format(API_VERSION, namespace)
    spec = cluster.job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    metadata = {"name": "circles", "labels": {"team": "art"}}
    created = api.create(path, {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec})
    body = {"status": document(cluster.job.status)}
    api.patch(f"{path}/circles/status", body)
    for now, job, event in cluster.emitted:
        meta = job.metadata.model_copy(update={"namespace": namespace, "uid": created["metadata"]["uid"]})
        sent = build_event(job.model_copy(update={"metadata": meta}), event, now, "operator-0")
        root = "/api/v1" if sent["apiVersion"] == "v1" else f"/apis/{sent['apiVersion']}"
        try:
            api.create(f"{root}/namespaces/{namespace}/events", sent)
        except ControlPlaneApiError as error:
            # An event that was already emitted is not stored twice.
            assert error.reason == "AlreadyExists"


def document(status: FineTuneJobStatus) -> dict[str, Any]:
    written: dict[str, Any] = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert yaml_text.load(yaml_text.dump(written)) == written
    return written


def normalize(described: str, cluster: RecordingCluster) -> str:
    """Return a description without the parts that differ between runs."""
    for pattern, replacement in VOLATILE.items():
        described = re.sub(pattern, replacement, described)
    head, title, events = described.partition("Events:\n")
    rows = [re.split(r" {2,}", row.strip(), maxsplit=4) for row in events.splitlines()]
    # kubectl prints events of the same second in any order.
    order = [event.message for _, _, event in cluster.emitted]
    rows[2:] = sorted(rows[2:], key=lambda row: order.index(row[4]))
    for row in rows[2:]:
        row[2] = AGE
    return head + title + align(rows, "  ")


def normalize_table(table: str) -> str:
    """Return a table without its ages, with aligned columns."""
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
    return align(cells)


def align(cells: list[list[str]], indent: str = "") -> str:
    """Return cells as an aligned table."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (indent + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines) + "\n"
