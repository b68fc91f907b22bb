"""Jobs that start from the checkpoint of another one: the step continues, with the complete state."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.manifest import FileEntry, Manifest
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import CheckpointSource, TrainingSpec
from finetune_trainer.checkpoint.store.select import JobFolders
from finetune_trainer.errors import ConfigError
from finetune_trainer.train.earlier_work import EarlierWork
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer

FIRST, ALL = 2, 4
"""Steps of the earlier job, and of both."""


def starting(spec: RunSpec, source: Path, **training: Any) -> RunSpec:
    """Return a run of another job that starts from a folder; `training` overrides settings, by their manifest names."""
    settings = TrainingSpec.model_validate({**spec.training.model_dump(by_alias=True, exclude_none=True), **training})
    start = CheckpointSource(path=str(source))
    return spec.model_copy(update={"uid": "9e000000-0000", "start_from": start, "training": settings})


def restored_step(ranks: Ranks) -> int:
    return int(next(report["restoredStep"] for report in ranks.reports() if "restoredStep" in report))


@pytest.fixture(name="spec", scope="module")
def _spec(base: Path, data: Path) -> RunSpec:
    return tiny.make_spec(base, data, steps=ALL, ema=True)


@pytest.fixture(name="earlier", scope="module")
def _earlier(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Return a job that has ended after its first steps."""
    folder = tmp_path_factory.mktemp("earlier")
    short = spec.model_copy(update={"training": spec.training.model_copy(update={"steps": FIRST})})
    ranks = Ranks(short, folder / "first")
    assert ranks.run() == [ExitCode.DONE], ranks.stderr()
    return ranks


def test_recreated_job_continues_with_the_complete_state(spec: RunSpec, earlier: Ranks, tmp_path: Path) -> None:
    undisturbed = Ranks(spec, tmp_path / "undisturbed")
    assert undisturbed.run() == [ExitCode.DONE], undisturbed.stderr()
    shutil.copytree(earlier.job_dir, tmp_path / "old")
    again = starting(spec, tmp_path / "old", steps=FIRST + 1)
    first = Ranks(again, tmp_path / "again")
    assert first.run() == [ExitCode.DONE], first.stderr()
    assert restored_step(first) == FIRST
    assert f"training continues after step {FIRST} of {tmp_path / 'old'}" in first.stderr()
    # The other job may be deleted as soon as this one has begun.
    shutil.rmtree(tmp_path / "old")
    second = Ranks(starting(spec, tmp_path / "old"), tmp_path / "again", 2)
    assert second.run() == [ExitCode.DONE], second.stderr()
    assert second.weights() == undisturbed.weights()


def test_changed_settings_keep_the_step(spec: RunSpec, earlier: Ranks, tmp_path: Path) -> None:
    changed = starting(spec, earlier.job_dir, learningRate=1e-4, optimizer="adafactor", seed=3)
    ranks = Ranks(changed, tmp_path / "job")
    assert ranks.run() == [ExitCode.DONE], ranks.stderr()
    assert restored_step(ranks) == FIRST
    assert "training.optimizer: the checkpoint has the state of adamw; adafactor starts without it" in ranks.stderr()


def test_sharded_job_starts_from_shards(base: Path, data: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(base, data, method="Full", sharding="full", steps=FIRST)
    first = Ranks(spec, tmp_path / "first", world_size=2)
    assert first.run() == [ExitCode.DONE] * 2, first.stderr()
    second = Ranks(starting(spec, first.job_dir, steps=FIRST + 1), tmp_path / "second", world_size=2)
    assert second.run() == [ExitCode.DONE] * 2, second.stderr()
    assert restored_step(second) == FIRST


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"steps": 1}, f"contains {FIRST} steps, and training.steps, which includes them, is 1; write a larger number"),
        ({"method": "Full", "lora": None}, "the checkpoint is one of LoRA, and training.method is Full; write"),
        (
            {"method": "Full", "lora": None, "sharding": "full"},
            "the checkpoint was written with training.sharding: none; write training.sharding: none",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_early(
    spec: RunSpec, earlier: Ranks, tmp_path: Path, training: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        work(starting(spec, earlier.job_dir, **training), tmp_path / "job").check()


def test_other_shapes_are_named(spec: RunSpec, earlier: Ranks, tmp_path: Path) -> None:
    ranks = Ranks(starting(spec, earlier.job_dir, lora={"rank": 3}), tmp_path)
    assert ranks.run() == [ExitCode.CONFIG]
    assert "checkpoint.from: the checkpoint holds other weights than training defines: " in ranks.stderr()
    assert re.search(r"has the shape \[2, \d+\] there and \[3, \d+\] here; write the method, rank, t", ranks.stderr())


def work(spec: RunSpec, job_dir: Path, notes: list[str] | None = None) -> EarlierWork:
    assert spec.start_from is not None
    return EarlierWork(spec.start_from, spec, JobFolders(job_dir), lambda: (), ([] if notes is None else notes).append)


def write_checkpoint(folder: Path, step: int, time: float) -> Path:
    """Write a checkpoint that holds no tensors."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}-a1"
    checkpoint.mkdir(parents=True)
    state = json.dumps({"step": step, "losses": []}).encode()
    (checkpoint / "state.json").write_bytes(state)
    entry = FileEntry(name="state.json", size_bytes=len(state), sha256=_sha256(state))
    manifest = Manifest(job_uid=folder.name, attempt=1, step=step, time=time, files=(entry,))
    (checkpoint / "manifest.json").write_text(manifest.sealed().model_dump_json(), "utf-8")
    return checkpoint


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_job_is_found_by_its_name_on_the_same_storage(spec: RunSpec, tmp_path: Path) -> None:
    own = tmp_path / "circles-00000003"
    write_checkpoint(tmp_path / "circles-00000001", 90, time=1.0)
    newest = write_checkpoint(tmp_path / "circles-00000002", 40, time=2.0)
    write_checkpoint(tmp_path / "circles-of-others-00000004", 99, time=3.0)
    named = spec.model_copy(
        update={
            "start_from": CheckpointSource(job="circles"),
            "training": spec.training.model_copy(update={"steps": 100}),
        }
    )
    notes: list[str] = []
    assert work(named, own, notes).find().folder == newest
    # A damaged checkpoint is skipped.
    older = write_checkpoint(tmp_path / "circles-00000002", 30, time=1.5)
    (newest / "state.json").write_bytes(b"{}")
    assert work(named, own, notes).find().folder == older
    assert notes[1].startswith(f"checkpoint.from: {newest} is damaged: state.json has 2 bytes instead of")
    missing = named.model_copy(update={"start_from": CheckpointSource(job="squares")})
    with pytest.raises(
        ConfigError, match=f"{tmp_path} contains no checkpoint of a job squares; write the name of a job"
    ):
        work(missing, own).check()


@pytest.mark.parametrize("level", ["job", "checkpoints", "checkpoint"])
def test_path_may_be_of_a_job_or_of_one_checkpoint(spec: RunSpec, tmp_path: Path, level: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "job", 3, time=1.0)
    folder = {"job": tmp_path / "job", "checkpoints": checkpoint.parent, "checkpoint": checkpoint}[level]
    assert work(starting(spec, folder), tmp_path / "own").find().folder == checkpoint
    with pytest.raises(ConfigError, match="contains no complete checkpoint; write the folder of a job"):
        work(starting(spec, tmp_path / "nothing"), tmp_path / "own").check()
