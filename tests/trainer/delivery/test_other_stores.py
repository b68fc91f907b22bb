"""Outputs in the stores of Google and Azure, on stand-ins. `make test-stores` installs them and runs these tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_contract.bucket import Bucket
from finetune_contract.outputs.spec import OutputSpec
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.delivery.target import ExportStage
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.outputs import Export, check_targets, deliver_outputs
from testing.controlplane.process import Guard
from testing.objectstore import stand_ins
from testing.trainer.killed_exports import FILES, PART_BYTES, contents, write_files

pytestmark = [
    pytest.mark.trainer,
    pytest.mark.skipif(not stand_ins.is_enabled(), reason="needs stand-ins of object stores: run `make test-stores`"),
]
STARTS = {"gs": stand_ins.start_gcs, "az": stand_ins.start_azure}
MARKER = "job.diffusers.output.json"


@pytest.fixture(params=sorted(STARTS))
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty folder in a new bucket of one store."""
    guard = Guard()
    try:
        for name, value in STARTS[request.param](tmp_path, guard).items():
            monkeypatch.setenv(name, value)
        location = f"{request.param}://models/lora"
        Bucket(location).client.mkdir("models")
        yield location
    finally:
        guard.close()


def deliver(url: str, job_dir: Path, stop_at: ExportStage | None = None) -> list[ExportStage]:
    """Deliver the output, and return the points that were reached."""
    reached: list[ExportStage] = []

    def on_stage(stage: ExportStage) -> None:
        reached.append(stage)
        if stage is stop_at:
            raise KeyboardInterrupt

    place = DeliveryPlace(job_dir, min_part_bytes=PART_BYTES, num_uploads=1)
    outputs = [OutputSpec.model_validate({"format": "diffusers", "to": url})]
    export = Export(place, "u", "step-1-a1", on_stage=on_stage)
    try:
        deliver_outputs(lambda _, folder: list(write_files(folder)), outputs, export)
    except KeyboardInterrupt:
        assert stop_at is not None
    return reached


def test_an_interrupted_delivery_is_continued_and_shows_nothing_before_its_end(url: str, tmp_path: Path) -> None:
    check_targets([OutputSpec.model_validate({"format": "diffusers", "to": url})], DeliveryPlace(tmp_path))
    assert Bucket(url).names() == []
    assert deliver(url, tmp_path / "job", ExportStage.UPLOADED).count(ExportStage.UPLOAD) == len(FILES) + 2
    assert not set(Bucket(url).names()) & {*FILES, MARKER}
    rest = deliver(url, tmp_path / "job", ExportStage.PUBLISH)
    assert ExportStage.UPLOAD not in rest, "the parts are kept"
    assert MARKER not in Bucket(url).names()
    rest = deliver(url, tmp_path / "job")
    assert ExportStage.UPLOAD not in rest
    assert Bucket(url).names() == sorted([*FILES, MARKER])
    assert {name: Bucket(url).read(name) for name in FILES} == {name: contents(name) for name in FILES}
    assert deliver(url, tmp_path / "job") == [], "a finished export is not repeated"


def test_a_missing_bucket_is_refused_before_training(url: str, tmp_path: Path) -> None:
    missing = url.replace("models", "not-a-bucket")
    with pytest.raises(ConfigError, match=rf"^outputs\[0\]\.to: {missing} cannot be written"):
        check_targets([OutputSpec.model_validate({"format": "diffusers", "to": missing})], DeliveryPlace(tmp_path))
