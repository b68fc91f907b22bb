"""Outputs of a real rank: checked before it trains, delivered after its last step, continued by the next attempt."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune_contract import paths
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import WrittenOutput
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.spec import CheckpointInterval
from finetune_trainer.delivery.target import ExportStage
from finetune_trainer.distributed.world import World
from finetune_trainer.export.retry import PatientWriter
from finetune_trainer.report import Reporter
from testing.objectstore.server import ObjectStore
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer
WEIGHTS = "pytorch_lora_weights.safetensors"


def test_a_rank_that_is_killed_while_it_uploads_is_continued(
    base: Path, data: Path, object_store: ObjectStore, bucket_url: str, tmp_path: Path
) -> None:
    targets = (f"{bucket_url}/lora", "local")
    outputs = tuple(OutputSpec.model_validate({"format": "diffusers", "to": to}) for to in targets)
    # An export pod writes this one.
    outputs += (OutputSpec.model_validate({"format": "openvino", "to": "openvino"}),)
    spec = tiny.make_spec(base, data, steps=2).model_copy(update={"outputs": outputs})
    folder = object_store.folder / bucket_url.removeprefix("s3://") / "lora"
    extra = object_store.environment
    killed = Ranks(spec, tmp_path, 1, kill_at=(ExportStage.UPLOADED, 0), extra=extra)
    assert killed.run() == [-signal.SIGKILL], killed.stderr()
    assert not (folder / WEIGHTS).exists()
    assert not (killed.job_dir / paths.OUTPUTS / "local").exists()
    (record,) = (killed.job_dir / "exports").glob("*.json")
    written_at = record.stat().st_mtime_ns

    again = Ranks(spec, tmp_path, 2, extra=extra)
    assert again.run() == [ExitCode.DONE], again.stderr()
    assert record.stat().st_mtime_ns == written_at, "the files were not written again"
    local = (again.job_dir / paths.OUTPUTS / "local" / WEIGHTS).read_bytes()
    assert (folder / WEIGHTS).read_bytes() == local
    (marker,) = folder.glob("*.output.json")
    assert marker.name == "tiny.diffusers.output.json"
    hashes = {file["name"]: file["sha256"] for file in json.loads(marker.read_text())["files"]}
    assert hashes[WEIGHTS] == hashlib.sha256(local).hexdigest()
    reports = again.reports()
    assert [each["to"] for each in reports[-1]["outputs"]] == [targets[0], str(again.job_dir / paths.OUTPUTS / "local")]
    assert "unfinishedOutputs" not in reports[-1] or not reports[-1]["unfinishedOutputs"]
    states = {each["state"] for report in reports for each in report.get("unfinishedOutputs", ())}
    assert "Uploading" in states


def test_a_target_without_permission_ends_the_rank_before_it_loads_anything(
    base: Path, data: Path, object_store: ObjectStore, tmp_path: Path
) -> None:
    output = OutputSpec.model_validate({"format": "diffusers", "to": "s3://not-a-bucket/lora"})
    spec = tiny.make_spec(base, data, steps=2).model_copy(update={"outputs": (output,)})
    ranks = Ranks(spec, tmp_path, extra=object_store.environment)
    assert ranks.run() == [ExitCode.CONFIG]
    assert "outputs[0].to: s3://not-a-bucket/lora cannot be written" in ranks.stderr()
    assert "Loading" not in {report["state"] for report in ranks.reports()}


@pytest.mark.parametrize("problem", ["adapter", "space"])
def test_what_would_fail_after_the_training_ends_the_rank_before_it_computes_anything(
    base: Path, data: Path, tmp_path: Path, problem: str
) -> None:
    """A further LoRA of another kind of base; more checkpoints than any disk holds."""
    other = tmp_path / "other.safetensors"
    matrices = {"A": torch.ones(1, 4), "B": torch.ones(4, 1)}
    save_file({f"unet.nowhere.lora_{name}.weight": matrix for name, matrix in matrices.items()}, other)
    output = {"format": "merged", "to": "merged", "adapters": [{"source": str(other)}]}
    changes = (
        {"outputs": (OutputSpec.model_validate(output),)}
        if problem == "adapter"
        else {"keep": 10**12, "checkpoint_interval": CheckpointInterval()}
    )
    message = {
        "adapter": r"outputs\.adapters\[0\]\.source: .*other.safetensors has adapters for layers that the base lacks",
        "space": "checkpoint.storage: the run will write about .* GiB are free; enlarge the volume, or write a smaller",
    }
    ranks = Ranks(tiny.make_spec(base, data, steps=2).model_copy(update=changes), tmp_path)
    assert ranks.run() == [ExitCode.CONFIG]
    assert re.search(message[problem], ranks.stderr())
    assert "Caching" not in {report["state"] for report in ranks.reports()}


def test_a_notice_ends_the_rank_while_it_writes_outputs() -> None:
    """All that is written and uploaded is kept, so nothing needs to be finished first."""
    inside = False

    @contextlib.contextmanager
    def released() -> Iterator[None]:
        nonlocal inside
        inside = True
        yield
        inside = False

    def write() -> tuple[WrittenOutput, ...]:
        assert inside
        return ()

    PatientWriter(World(0, 1, 0, torch.device("cpu")), Reporter(0, None), 10.0, released).write(write)
    assert not inside
